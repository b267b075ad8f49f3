// Vectors as wide as the registers of the instruction set that a kernel file is compiled for.
// Memory need not be aligned.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../math/macros.h"

namespace twophase::TP_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
using FloatVector = float __attribute__((vector_size(kVectorBytes)));
using DoubleVector = double __attribute__((vector_size(kVectorBytes)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Type = FloatVector;
};
template <>
struct VectorOf<double> {
  using Type = DoubleVector;
};
template <class T>
using Vector = typename VectorOf<T>::Type;
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
TP_HD Vector<T> load_vector(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
// The first n < kLanes elements, then zeros; reads no further.
template <class T>
TP_HD Vector<T> load_vector(const T* p, int64_t n) {
  Vector<T> v{};
  __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}
template <class T>
TP_HD void store_vector(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <class T>
TP_HD Vector<T> broadcast(T x) {
  return x - Vector<T>{};  // not x + 0, which loses the sign of -0
}

// a * b + c, fused where the hardware has it. Written out: the kernels are compiled without
// contraction.
#if defined(__AVX512F__)
TP_HD FloatVector fused(FloatVector a, FloatVector b, FloatVector c) {
  return _mm512_fmadd_ps(a, b, c);
}
TP_HD DoubleVector fused(DoubleVector a, DoubleVector b, DoubleVector c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__FMA__)
TP_HD FloatVector fused(FloatVector a, FloatVector b, FloatVector c) {
  return _mm256_fmadd_ps(a, b, c);
}
TP_HD DoubleVector fused(DoubleVector a, DoubleVector b, DoubleVector c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
TP_HD FloatVector fused(FloatVector a, FloatVector b, FloatVector c) { return a * b + c; }
TP_HD DoubleVector fused(DoubleVector a, DoubleVector b, DoubleVector c) { return a * b + c; }
#endif

// Halves are added, lane i + half to lane i, down to one. In registers: numbers that are stored one
// by one and read back two at a time stall.
template <int half, class V, int... i>
TP_HD V add_halves(V v, std::integer_sequence<int, i...> lanes) {
  constexpr int n = sizeof...(i);
  v += __builtin_shufflevector(v, v, ((i + half) % n)...);
  if constexpr (half > 1) v = add_halves<half / 2>(v, lanes);
  return v;
}
template <class T>
TP_HD T sum_lanes(Vector<T> v) {
  return add_halves<kLanes<T> / 2>(v, std::make_integer_sequence<int, kLanes<T>>{})[0];
}

template <int n>
struct Constant {
  static constexpr int value = n;
};
// Calls f(Constant<n>{}), 1 <= n <= kMax: a loop count that the compiler knows.
template <int kMax, class F>
TP_HD void with_constant(int64_t n, const F& f) {
  if constexpr (kMax > 0) {
    if (n == kMax) return f(Constant<kMax>{});
    with_constant<kMax - 1>(n, f);
  }
}

}  // namespace twophase::TP_ISA
