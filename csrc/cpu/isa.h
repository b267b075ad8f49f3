// One kernel source, several instruction sets. Files in csrc/cpu/kernels are compiled once per set
// (CMakeLists.txt gives the flags and TP_ISA, the namespace), and the best one that the processor
// has is chosen at run time. Those files include nothing of torch and next to nothing of the
// standard library: an inline function shared with other files could be linked in its AVX-512 form.
//
//   kernels/foo.h:    TP_KERNEL(void, foo, (const float* x, int64_t n))
//   kernels/foo.cpp:  namespace twophase::TP_ISA { void foo(const float* x, int64_t n) {...} }
//   foo.cpp:          TP_DISPATCH(foo)(x, n);
#pragma once

namespace twophase {

enum class Isa : int { kBaseline, kX86V3, kX86V4 };  // each has what those before it have

Isa isa();                  // in use
const char* isa_name(Isa);  // "baseline", "x86-64-v3", "x86-64-v4"
// Also "v3" and "v4"; std::invalid_argument, which names `argument`, for another name
Isa isa_named(const char* name, const char* argument);
bool isa_supported(Isa);  // compiled in, and this processor has it
void set_isa(Isa);        // for tests; std::invalid_argument where not supported

}  // namespace twophase

#if defined(__x86_64__)
#define TP_KERNEL(result, name, arguments) \
  namespace twophase::baseline {           \
  result name arguments;                   \
  }                                        \
  namespace twophase::v3 {                 \
  result name arguments;                   \
  }                                        \
  namespace twophase::v4 {                 \
  result name arguments;                   \
  }
#define TP_DISPATCH(name)                                     \
  (::twophase::isa() == ::twophase::Isa::kX86V4   ? &v4::name \
   : ::twophase::isa() == ::twophase::Isa::kX86V3 ? &v3::name \
                                                  : &baseline::name)
#else
#define TP_KERNEL(result, name, arguments) \
  namespace twophase::baseline {           \
  result name arguments;                   \
  }
#define TP_DISPATCH(name) (&baseline::name)
#endif
