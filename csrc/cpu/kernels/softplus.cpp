#include "softplus.h"

#include "../../math/softplus.h"
#include "stream.h"

namespace twophase::TP_ISA {
namespace {

template <class T>
void forward(const void* x_, void* y_, int64_t n, bool stream, double beta, double log_beta) {
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  const auto p = softplus_parameters<Compute<T>>(beta, log_beta);
  const auto compute = [=](int64_t begin, int64_t count, T* out) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(&out[i], softplus(load(x[begin + i]), p));
  };
  stream ? stream_elements(y, n, compute) : compute(0, n, y);
}

template <class T>
void backward(const void* grad_, const void* y_, void* out_, int64_t n, bool stream, double beta,
              double log_beta) {
  const T* grad = static_cast<const T*>(grad_);
  const T* y = static_cast<const T*>(y_);
  const auto p = softplus_parameters<Compute<T>>(beta, log_beta);
  const auto compute = [=](int64_t begin, int64_t count, T* out) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      store(&out[i], load(grad[begin + i]) * softplus_derivative(load(y[begin + i]), p));
  };
  T* out = static_cast<T*>(out_);
  stream ? stream_elements(out, n, compute) : compute(0, n, out);
}

template <class T>
void double_backward(const void* grad_grad_, const void* grad_, const void* y_, void* out_grad_,
                     void* out_y_, int64_t n, double beta, double log_beta) {
  const T* grad_grad = static_cast<const T*>(grad_grad_);
  const T* grad = static_cast<const T*>(grad_);
  const T* y = static_cast<const T*>(y_);
  T* out_grad = static_cast<T*>(out_grad_);
  T* out_y = static_cast<T*>(out_y_);
  const auto p = softplus_parameters<Compute<T>>(beta, log_beta);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Compute<T> gg = load(grad_grad[i]), v = load(y[i]);
    store(&out_grad[i], gg * softplus_derivative(v, p));
    store(&out_y[i], gg * load(grad[i]) * p.beta * softplus_complement(v, p));
  }
}

}  // namespace

void softplus_forward(Dtype dtype, const void* x, void* y, int64_t n, bool stream, double beta,
                      double log_beta) {
  TP_BY_DTYPE(forward, x, y, n, stream, beta, log_beta)
}
void softplus_backward(Dtype dtype, const void* grad, const void* y, void* out, int64_t n,
                       bool stream, double beta, double log_beta) {
  TP_BY_DTYPE(backward, grad, y, out, n, stream, beta, log_beta)
}
void softplus_double_backward(Dtype dtype, const void* grad_grad, const void* grad, const void* y,
                              void* out_grad, void* out_y, int64_t n, double beta,
                              double log_beta) {
  TP_BY_DTYPE(double_backward, grad_grad, grad, y, out_grad, out_y, n, beta, log_beta)
}

}  // namespace twophase::TP_ISA
