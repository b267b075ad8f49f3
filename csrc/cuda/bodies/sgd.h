// sgd_: torch.optim.SGD's update of many tensors.
#pragma once

#include "../../math/sgd.h"
#include "multi_tensor.h"

namespace twophase {

template <class T>
struct SgdTensor {
  T* p;
  const T* g;
  T* buffer;  // null without momentum
  int64_t n;
  int64_t chunks_before;
  bool is_first_step;  // the buffer holds nothing yet
};

// As sgd_update in csrc/math/sgd.h, with what is one value for a whole tensor decided at run time.
// b: the buffer's element, which is written even where there is no buffer.
template <class T>
TP_HD T sgd_step(T p, T g, T& b, bool buffered, bool is_first_step, const SgdScalars<T>& s) {
  g = s.decays ? sgd_gradient<true>(p, g, s) : sgd_gradient<false>(p, g, s);
  if (!buffered) return multiply_add(s.step, g, p);
  b = is_first_step ? g : sgd_buffer(b, g, s);
  return multiply_add(s.step, s.nesterov ? multiply_add(s.momentum, b, g) : b, p);
}

// One element in memory; buffer may be null.
template <class T>
TP_BODY void sgd_element(T* p, T g, T* buffer, bool is_first_step, const SgdScalars<T>& s) {
  T b = buffer && !is_first_step ? *buffer : T(0);
  *p = sgd_step(*p, g, b, buffer != nullptr, is_first_step, s);
  if (buffer) *buffer = b;
}

template <class T, class Ctx>
TP_BODY void sgd_body(const Ctx& ctx, NoShared&, const TensorTable<SgdTensor<T>>& table,
                      const SgdScalars<T>& scalars) {
  constexpr int kSize = Pack<T>::kSize;
  for_each_chunk(ctx, table, [&](const SgdTensor<T>& tensor, int64_t begin, int64_t end) {
    const bool aligned = aligned16(tensor.p, tensor.g, tensor.buffer);
    for (int64_t i = begin + kSize * ctx.thread(); i < end; i += kSize * ctx.threads()) {
      if (aligned && i + kSize <= end) {
        Pack<T> p = packs(tensor.p + i)[0], b{};
        const Pack<T> g = packs(tensor.g + i)[0];
        if (tensor.buffer && !tensor.is_first_step) b = packs(tensor.buffer + i)[0];
        TP_UNROLL
        for (int e = 0; e < kSize; ++e)
          p.v[e] = sgd_step(p.v[e], g.v[e], b.v[e], tensor.buffer != nullptr, tensor.is_first_step,
                            scalars);
        packs(tensor.p + i)[0] = p;
        if (tensor.buffer) packs(tensor.buffer + i)[0] = b;
      } else {
        for (int64_t k = i; k < smaller(i + kSize, end); ++k)
          sgd_element(tensor.p + k, tensor.g[k], tensor.buffer ? tensor.buffer + k : nullptr,
                      tensor.is_first_step, scalars);
      }
    }
  });
}

}  // namespace twophase
