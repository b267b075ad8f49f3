#include "last_layer_loss.h"

#include "../../math/softplus.h"

namespace twophase::TP_ISA {
namespace {

// exp(x), x <= 0 or NaN, without a branch: 2^n 2^f with |f| <= 1/2, and 0 where that would be
// subnormal. log(2) in two parts, the first short enough for its product with n to be exact.
TP_HD double exp_nonpositive(double x) {
  using C = SoftplusConstants<double>;
  constexpr double kLog2E = 1.4426950408889634074, kLog2Short = 6.93147180369123816490e-01,
                   kLog2Rest = 1.90821492927058770002e-10;
  const double clamped = x < -C::kVanished ? -C::kVanished : x;
  const double shifted = fused(clamped, kLog2E, C::kRound), n = shifted - C::kRound;
  const double rest = fused(-n, kLog2Rest, fused(-n, kLog2Short, clamped));
  const double power = bit_cast<double>((bit_cast<uint64_t>(shifted) << C::kMantissa) + C::kOne);
  const double result = exp2_polynomial(rest * kLog2E) * power;
  return x < -C::kVanished ? 0.0 : result;
}

double cross_entropy_row(double* z, int64_t k, int64_t label, double scale) {
  double max = z[0], sum = 0;
#pragma omp simd reduction(max : max)
  for (int64_t j = 0; j < k; ++j) max = z[j] > max ? z[j] : max;
  const double z_label = z[label];
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < k; ++j) {
    z[j] = exp_nonpositive(z[j] - max);
    sum += z[j];
  }
  const double e_label = z[label];
#pragma omp simd
  for (int64_t j = 0; j < k; ++j) z[j] = cross_entropy_delta(z[j], sum, false, scale);
  z[label] = cross_entropy_delta(e_label, sum, true, scale);
  return cross_entropy(z_label, max, sum);
}

template <class T>
double squared_error_row(double* z, int64_t k, const T* y, double scale) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < k; ++j) {
    const double target = static_cast<double>(y[j]), error = z[j] - target;
    sum += error * error;
    z[j] = squared_error_delta(z[j], target, scale);
  }
  return sum;
}

template <class T>
double loss_as(Loss loss, double* z, const void* bias_, int64_t k, const void* target,
               int64_t sample, double scale, void* delta_) {
  // Last, as where the logits of several holders of columns are added up before.
  if (const T* bias = static_cast<const T*>(bias_)) {
#pragma omp simd
    for (int64_t j = 0; j < k; ++j) z[j] += static_cast<double>(bias[j]);
  }
  const double result =
      loss == Loss::kCrossEntropy
          ? cross_entropy_row(z, k, static_cast<const int64_t*>(target)[sample], scale)
          : squared_error_row(z, k, static_cast<const T*>(target) + sample * k, scale);
  T* delta = static_cast<T*>(delta_);
#pragma omp simd
  for (int64_t j = 0; j < k; ++j) delta[j] = static_cast<T>(z[j]);
  return result;
}

template <class T>
void sum_as(const T* rows, int64_t n, int64_t stride, int64_t k, double* sums) {
  __builtin_memset(sums, 0, k * sizeof(double));
  for (int64_t i = 0; i < n; ++i) {
    const T* row = rows + i * stride;
#pragma omp simd
    for (int64_t j = 0; j < k; ++j) sums[j] += static_cast<double>(row[j]);
  }
}

}  // namespace

double last_layer_loss(Dtype dtype, Loss loss, double* z, const void* bias, int64_t k,
                       const void* target, int64_t sample, double scale, void* delta) {
  return dtype == Dtype::kFloat64 ? loss_as<double>(loss, z, bias, k, target, sample, scale, delta)
                                  : loss_as<float>(loss, z, bias, k, target, sample, scale, delta);
}

void last_layer_sum(Dtype dtype, const void* rows, int64_t n, int64_t stride, int64_t k,
                    double* sums) {
  dtype == Dtype::kFloat64 ? sum_as(static_cast<const double*>(rows), n, stride, k, sums)
                           : sum_as(static_cast<const float*>(rows), n, stride, k, sums);
}

}  // namespace twophase::TP_ISA
