#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace twophase {
namespace {

constexpr const char* kNames[] = {"baseline", "x86-64-v3", "x86-64-v4"};
constexpr const char* kShort[] = {"baseline", "v3", "v4"};

Isa best() {
  for (Isa candidate : {Isa::kX86V4, Isa::kX86V3})
    if (isa_supported(candidate)) return candidate;
  return Isa::kBaseline;
}

// TWOPHASE_ISA limits the choice, to compare or to rule out an instruction set.
Isa initial() {
  const char* wanted = std::getenv("TWOPHASE_ISA");
  const Isa limit = wanted && *wanted ? isa_named(wanted, "TWOPHASE_ISA") : Isa::kX86V4;
  return std::min(limit, best());
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value{initial()};
  return value;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_named(const char* name, const char* argument) {
  for (Isa candidate : {Isa::kBaseline, Isa::kX86V3, Isa::kX86V4})
    for (const char* known : {isa_name(candidate), kShort[static_cast<int>(candidate)]})
      if (!std::strcmp(name, known)) return candidate;
  throw std::invalid_argument(std::string(argument) +
                              ": expected baseline, x86-64-v3 or x86-64-v4, got " + name);
}

bool isa_supported(Isa isa) {
// Of the levels that the kernels' -march flags let the compiler use.
#if defined(TP_CPU_LEVELS)
  if (isa == Isa::kX86V4) return __builtin_cpu_supports("x86-64-v4");
  if (isa == Isa::kX86V3) return __builtin_cpu_supports("x86-64-v3");
#elif defined(__x86_64__)  // GCC before 12 and Clang before 17 know the features alone
  if (isa == Isa::kX86V4)
    return isa_supported(Isa::kX86V3) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::kX86V3)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
#endif
  return isa == Isa::kBaseline;
}

Isa isa() { return current().load(std::memory_order_relaxed); }

void set_isa(Isa isa) {
  if (!isa_supported(isa))
    throw std::invalid_argument(std::string("isa: this processor or build lacks ") + isa_name(isa));
  current().store(isa);
}

}  // namespace twophase
