// Vectors as wide as the registers of the instruction set that a kernel file is compiled for.
// Memory need not be aligned.
#pragma once

#include <cstdint>

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

template <class T>
TP_HD T sum_lanes(Vector<T> v) {
  T x[kLanes<T>];
  store_vector(x, v);
  TP_UNROLL
  for (int width = kLanes<T> / 2; width > 0; width /= 2) TP_UNROLL
  for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
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
