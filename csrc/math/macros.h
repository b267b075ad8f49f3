// Qualifiers for scalar code that is compiled for the CPU and for CUDA.
#pragma once

#if defined(__CUDACC__)
#define TP_HD __host__ __device__ __forceinline__
#else
// static + always_inline: the CPU compiles this code once per instruction set; a function left out
// of line would be merged by the linker and could carry AVX-512 into the baseline path.
#define TP_HD static inline __attribute__((always_inline))
#endif

namespace twophase {

// Fused multiply-add where the hardware has it, two roundings elsewhere (the software fma would not
// vectorise). Only for functions whose error bound holds both ways.
TP_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
TP_HD double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

}  // namespace twophase
