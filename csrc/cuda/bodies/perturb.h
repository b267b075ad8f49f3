// perturb_: p[i] += sigma * normal(key, i) over many tensors. A thread takes one Philox block, that
// is four consecutive elements, at a time.
#pragma once

#include "../../math/normal.h"
#include "multi_tensor.h"

namespace twophase {

template <class T>
struct NoisyTensor {
  T* p;
  uint64_t key;
  int64_t n;
  int64_t chunks_before;
  float sigma;
};

template <class T, class Ctx>
TP_BODY void perturb_body(const Ctx& ctx, NoShared&, const TensorTable<NoisyTensor<T>>& table) {
  static_assert(kChunk % 4 == 0);
  for_each_chunk(ctx, table, [&](const NoisyTensor<T>& tensor, int64_t begin, int64_t end) {
    const bool aligned = aligned16(tensor.p);
    for (int64_t i = begin + 4 * ctx.thread(); i < end; i += 4 * ctx.threads()) {
      const NormalBlock block = normal_block(tensor.key, static_cast<uint64_t>(i / 4));
      const float z[4] = {block.z0, block.z1, block.z2, block.z3};
      if (aligned && i + 4 <= end) {
        TP_UNROLL
        for (int first = 0; first < 4; first += Pack<T>::kSize) {
          Pack<T> pack = packs(tensor.p + i + first)[0];
          TP_UNROLL
          for (int e = 0; e < Pack<T>::kSize; ++e)
            pack.v[e] = add_noise(pack.v[e], z[first + e], tensor.sigma);
          packs(tensor.p + i + first)[0] = pack;
        }
      } else {
        TP_UNROLL
        for (int e = 0; e < 4; ++e)
          if (i + e < end) tensor.p[i + e] = add_noise(tensor.p[i + e], z[e], tensor.sigma);
      }
    }
  });
}

}  // namespace twophase
