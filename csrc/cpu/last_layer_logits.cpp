#include <torch/csrc/stable/library.h>

#include <vector>

#include "last_layer_passes.h"
#include "last_layer_rows.h"

namespace twophase {
namespace {

template <class T>
void logits_of(const Rows& rows, const void* weight, double* logits) {
  const Slices slices(rows.m);
  const int64_t numbers = rows.b * rows.k;
  std::vector<T> partial(slices.count * numbers);
  torch::stable::parallel_for(0, slices.count, 1, [&](int64_t begin, int64_t end) {
    TP_DISPATCH(last_layer_logits)
    (rows.dtype, rows.h_dtype, rows.pointers.data(), weight, rows.b, rows.k, rows.m,
     slices.begin(begin), slices.end(end - 1), slices.length, partial.data() + begin * numbers);
  });
  TP_DISPATCH(last_layer_sum)(rows.dtype, partial.data(), slices.count, numbers, numbers, logits);
}

Tensor last_layer_logits_op(Tensor weight, Tensor h, Tensor index) {
  const Rows rows(h, index, weight);
  const Tensor packed = torch::stable::contiguous(weight);
  Tensor logits =
      torch::stable::new_zeros(weight, {rows.b, rows.k}, torch::headeronly::ScalarType::Double);
  const auto run = rows.dtype == Dtype::kFloat64 ? logits_of<double> : logits_of<float>;
  run(rows, packed.const_data_ptr(), static_cast<double*>(logits.mutable_data_ptr()));
  return logits;
}

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("last_layer_logits", TORCH_BOX(&twophase::last_layer_logits_op));
}
