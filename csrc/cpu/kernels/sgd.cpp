#include "sgd.h"

#include "../../math/sgd.h"

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

template <bool kWeightDecay, bool kNesterov, bool kFresh, class T>
void with_momentum(const Arrays<T>& a, const SgdScalars<T>& s) {
  T *p = a.p, *b = a.b;
  const T* g = a.g;
#pragma omp simd
  for (int64_t i = 0; i < a.n; ++i)
    p[i] = sgd_update<kWeightDecay, kNesterov, kFresh>(p[i], g[i], &b[i], s);
}

template <bool kWeightDecay, class T>
void by_flags(const Arrays<T>& a, const SgdScalars<T>& s, bool fresh, bool nesterov) {
  if (!a.b) return plain<kWeightDecay>(a, s);
  if (nesterov)
    return fresh ? with_momentum<kWeightDecay, true, true>(a, s)
                 : with_momentum<kWeightDecay, true, false>(a, s);
  return fresh ? with_momentum<kWeightDecay, false, true>(a, s)
               : with_momentum<kWeightDecay, false, false>(a, s);
}

template <class T>
void sgd_as(void* p, const void* g, void* b, int64_t n, bool fresh, bool nesterov,
            bool weight_decay, const SgdScalars<T>& s) {
  const Arrays<T> a{static_cast<T*>(p), static_cast<const T*>(g), static_cast<T*>(b), n};
  return weight_decay ? by_flags<true>(a, s, fresh, nesterov)
                      : by_flags<false>(a, s, fresh, nesterov);
}

}  // namespace

void sgd(Dtype dtype, void* p, const void* g, void* b, int64_t n, bool fresh, double lr,
         double momentum, double dampening, double weight_decay, bool nesterov, bool maximize) {
  const bool decay = weight_decay != 0;
  if (dtype == Dtype::kFloat64)
    return sgd_as(p, g, b, n, fresh, nesterov, decay,
                  sgd_scalars<double>(lr, momentum, dampening, weight_decay, maximize));
  sgd_as(p, g, b, n, fresh, nesterov, decay,
         sgd_scalars<float>(lr, momentum, dampening, weight_decay, maximize));
}

}  // namespace twophase::TP_ISA
