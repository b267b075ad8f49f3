// Rows of features as vectors, shared by the ways to multiply them.
#pragma once

#include <utility>

#include "../../math/dtype.h"
#include "vector.h"

namespace twophase::TP_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Size of the blocks when n is divided evenly into blocks of at most `most`.
int64_t even_block(int64_t n, int64_t most) {
  const int64_t blocks = (n + most - 1) / most;
  return (n + blocks - 1) / blocks;
}

constexpr int kStrip = 2;  // vectors of a row that are read together
template <class T>
constexpr int kStripLanes = kStrip * kLanes<T>;

// Vector s of a strip, as it is computed with. Of bfloat16 those are the even and the odd features:
// a shift and a mask. The tiles that they meet are split alike.
template <class T>
TP_HD Vector<T> load_strip(const T* strip, int s) {
  return load_vector(strip + s * kLanes<T>);
}
TP_HD FloatVector load_strip(const BFloat16* strip, int s) {
  using Bits = uint32_t __attribute__((vector_size(kVectorBytes)));
  Bits bits;
  __builtin_memcpy(&bits, strip, sizeof(bits));
  return reinterpret_cast<FloatVector>(s == 0 ? bits << 16 : bits & 0xffff0000u);
}
// A strip of n features, then zeros; reads no further.
template <class T, class H>
struct Padded {
  H features[kStripLanes<T>] = {};
  Padded(const H* p, int64_t n) { __builtin_memcpy(features, p, n * sizeof(H)); }
};

// Consecutive features of a strip to even and odd ones, and back
template <class H>
constexpr bool kSplit = sizeof(H) == 2;
template <class T>
using Lanes = std::make_integer_sequence<int, kLanes<T>>;
template <class V, int... i>
TP_HD void split(V (&x)[kStrip], std::integer_sequence<int, i...>) {
  const V even = __builtin_shufflevector(x[0], x[1], (2 * i)...);
  x[1] = __builtin_shufflevector(x[0], x[1], (2 * i + 1)...);
  x[0] = even;
}
template <class V, int... i>
TP_HD void merge(V (&x)[kStrip], std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  const V low = __builtin_shufflevector(x[0], x[1], (i / 2 + i % 2 * n)...);
  x[1] = __builtin_shufflevector(x[0], x[1], (n / 2 + i / 2 + i % 2 * n)...);
  x[0] = low;
}

// A vector that is used more than once: as a memory operand it would be loaded each time.
template <class V>
TP_HD V in_register(V v) {
#if defined(__AVX__)
  asm("" : "+v"(v));
#endif
  return v;
}

}  // namespace
}  // namespace twophase::TP_ISA
