#include "sgd.h"

namespace twophase::TP_ISA {
namespace {

template <class T>
struct Arrays {
  T* p;
  const T* g;
  T* b;
  int64_t n;
};

template <bool kWeightDecay, class T>
void plain(const Arrays<T>& a, const SgdScalars<T>& s) {
  T* p = a.p;
  const T* g = a.g;
#pragma omp simd
  for (int64_t i = 0; i < a.n; ++i) p[i] = sgd_update<kWeightDecay>(p[i], g[i], s);
}

template <bool kWeightDecay, bool kNesterov, bool kFirstStep, class T>
void with_momentum(const Arrays<T>& a, const SgdScalars<T>& s) {
  T *p = a.p, *b = a.b;
  const T* g = a.g;
#pragma omp simd
  for (int64_t i = 0; i < a.n; ++i)
    p[i] = sgd_update<kWeightDecay, kNesterov, kFirstStep>(p[i], g[i], &b[i], s);
}

template <bool kWeightDecay, class T>
void by_flags(const Arrays<T>& a, const SgdScalars<T>& s, bool is_first_step) {
  if (!a.b) return plain<kWeightDecay>(a, s);
  if (s.nesterov)
    return is_first_step ? with_momentum<kWeightDecay, true, true>(a, s)
                         : with_momentum<kWeightDecay, true, false>(a, s);
  return is_first_step ? with_momentum<kWeightDecay, false, true>(a, s)
                       : with_momentum<kWeightDecay, false, false>(a, s);
}

template <class T>
void sgd_as(void* p, const void* g, void* b, int64_t n, bool is_first_step, const SgdRule& rule) {
  const Arrays<T> a{static_cast<T*>(p), static_cast<const T*>(g), static_cast<T*>(b), n};
  const SgdScalars<T> s = sgd_scalars<T>(rule);
  return s.decays ? by_flags<true>(a, s, is_first_step) : by_flags<false>(a, s, is_first_step);
}

}  // namespace

void sgd(Dtype dtype, void* p, const void* g, void* b, int64_t n, bool is_first_step,
         const SgdRule& rule) {
  dtype == Dtype::kFloat64 ? sgd_as<double>(p, g, b, n, is_first_step, rule)
                           : sgd_as<float>(p, g, b, n, is_first_step, rule);
}

}  // namespace twophase::TP_ISA
