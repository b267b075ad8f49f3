// One element of torch.optim.SGD's update, with the roundings of its elementwise operations:
// x.add(y, alpha=a) is fma(a, y, x), x.mul(a) one rounding.
//   g <- -g if maximize;  g <- g + weight_decay p
//   b <- g on the first step, else momentum b + (1 - dampening) g
//   p <- p - lr (g + momentum b if nesterov, b with momentum, else g)
#pragma once

#include "macros.h"

namespace twophase {

TP_HD float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
TP_HD double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

// What every operator that steps is told.
struct SgdRule {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

// The rule in the parameter's type.
template <class T>
struct SgdScalars {
  T step;  // -lr
  T momentum;
  T gradient_weight;  // 1 - dampening
  T weight_decay;
  T sign;  // -1 to maximize, else 1
  bool decays, nesterov;
};

template <class T>
TP_HD SgdScalars<T> sgd_scalars(const SgdRule& rule) {
  return {static_cast<T>(-rule.lr),
          static_cast<T>(rule.momentum),
          static_cast<T>(1.0 - rule.dampening),
          static_cast<T>(rule.weight_decay),
          rule.maximize ? T(-1) : T(1),
          rule.weight_decay != 0,
          rule.nesterov};
}

// The gradient that enters the step. Without weight decay p stays out of it, whatever it holds.
template <bool kWeightDecay, class T>
TP_HD T sgd_gradient(T p, T g, const SgdScalars<T>& s) {
  g = s.sign * g;
  if constexpr (kWeightDecay) g = multiply_add(s.weight_decay, p, g);
  return g;
}

template <class T>
TP_HD T sgd_buffer(T b, T g, const SgdScalars<T>& s) {
  return multiply_add(s.gradient_weight, g, b * s.momentum);
}

// Plain SGD: returns the new p.
template <bool kWeightDecay, class T>
TP_HD T sgd_update(T p, T g, const SgdScalars<T>& s) {
  return multiply_add(s.step, sgd_gradient<kWeightDecay>(p, g, s), p);
}

// With momentum: returns the new p and overwrites the buffer.
template <bool kWeightDecay, bool kNesterov, bool kFirstStep, class T>
TP_HD T sgd_update(T p, T g, T* b, const SgdScalars<T>& s) {
  g = sgd_gradient<kWeightDecay>(p, g, s);
  const T buffer = kFirstStep ? g : sgd_buffer(*b, g, s);
  *b = buffer;
  return multiply_add(s.step, kNesterov ? multiply_add(s.momentum, buffer, g) : buffer, p);
}

}  // namespace twophase
