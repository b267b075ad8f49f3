// Qualifiers for scalar code that is compiled for the CPU and for CUDA.
#pragma once

#if defined(__CUDACC__)
#define TP_HD __host__ __device__ __forceinline__
#define TP_UNROLL _Pragma("unroll")
#else
// static + always_inline: the CPU compiles this code once per instruction set; a function left out
// of line would be merged by the linker and could carry AVX-512 into the baseline path.
#define TP_HD static inline __attribute__((always_inline))
#define TP_UNROLL _Pragma("GCC unroll 16")
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

TP_HD float absolute(float x) { return __builtin_fabsf(x); }
TP_HD double absolute(double x) { return __builtin_fabs(x); }

}  // namespace twophase
