// Element types of the kernels, free of torch, and the 16-bit storage formats.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

namespace twophase {

enum class Dtype : int { kFloat16, kBFloat16, kFloat32, kFloat64 };

TP_HD int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
TP_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// load() widens an element to the type it is computed in, store() rounds to nearest even once.
TP_HD float load(float x) { return x; }
TP_HD double load(double x) { return x; }
TP_HD float load(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
TP_HD float load(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Normal: rebias the exponent. Infinity and NaN: exponent all ones. Subnormal: let a float
  // subtraction normalise, because a float32 subnormal here would stall the vector unit.
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>((magnitude << 13) + (113u << 23)) -
                                                bit_cast<float>(113u << 23));
  const uint32_t bits = magnitude >= 0x7c00u ? special : (magnitude < 0x0400u ? subnormal : normal);
  return bit_cast<float>(bits | sign);
}

// The type that an element is computed in.
template <class T>
using Compute = decltype(load(T{}));

TP_HD void store(float* out, float x) { *out = x; }
TP_HD void store(double* out, double x) { *out = x; }
TP_HD void store(BFloat16* out, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}
TP_HD void store(Half* out, float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the half is subnormal: adding 0.5 aligns its last bit with the float's.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  const uint32_t half = magnitude > 0x7f800000u    ? nan
                        : magnitude >= 0x477ff000u ? 0x7c00u  // rounds to 65520 and above
                        : magnitude < 0x38800000u  ? subnormal
                                                   : normal;
  out->bits = static_cast<uint16_t>(half | sign);
}

// Returns function<T>(...), T the element type of `dtype`.
#define TP_BY_DTYPE(function, ...)            \
  switch (dtype) {                            \
    case Dtype::kFloat16:                     \
      return function<Half>(__VA_ARGS__);     \
    case Dtype::kBFloat16:                    \
      return function<BFloat16>(__VA_ARGS__); \
    case Dtype::kFloat32:                     \
      return function<float>(__VA_ARGS__);    \
    case Dtype::kFloat64:                     \
      return function<double>(__VA_ARGS__);   \
  }

}  // namespace twophase
