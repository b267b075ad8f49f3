#include "../softplus.h"

#include <torch/csrc/stable/library.h>

#include "huge_pages.h"
#include "kernels/softplus.h"
#include "parallel.h"

namespace twophase {
namespace {

// Results of the size of a last-level cache, which also meets the input there, do not stay in it.
constexpr int64_t kStreamBytes = 32 << 20;
constexpr int64_t kUnit = 16384;  // elements: a few microseconds of work a thread

int64_t width(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}
const char* at(const void* p, int64_t i, Dtype d) {
  return static_cast<const char*>(p) + i * width(d);
}
char* at(void* p, int64_t i, Dtype d) { return static_cast<char*>(p) + i * width(d); }

struct Cpu {
  static void forward(const Tensor&, Dtype d, const void* x, void* y, int64_t n, double beta) {
    if (y != x) hint_huge_pages(y, n * width(d));
    const bool stream = y != x && n * width(d) >= kStreamBytes;
    parallel_chunks(n, kUnit, [&](int64_t i, int64_t end) {
      TP_DISPATCH(softplus_forward)
      (d, at(x, i, d), at(y, i, d), end - i, stream, beta, std::log(beta));
    });
  }
  static void backward(const Tensor&, Dtype d, const void* grad, const void* y, void* out,
                       int64_t n, double beta) {
    hint_huge_pages(out, n * width(d));
    const bool stream = out != grad && out != y && n * width(d) >= kStreamBytes;
    parallel_chunks(n, kUnit, [&](int64_t i, int64_t end) {
      TP_DISPATCH(softplus_backward)
      (d, at(grad, i, d), at(y, i, d), at(out, i, d), end - i, stream, beta, std::log(beta));
    });
  }
  static void double_backward(const Tensor&, Dtype d, const void* grad_grad, const void* grad,
                              const void* y, void* out_grad, void* out_y, int64_t n, double beta) {
    hint_huge_pages(out_grad, n * width(d));
    hint_huge_pages(out_y, n * width(d));
    parallel_chunks(n, kUnit, [&](int64_t i, int64_t end) {
      TP_DISPATCH(softplus_double_backward)
      (d, at(grad_grad, i, d), at(grad, i, d), at(y, i, d), at(out_grad, i, d), at(out_y, i, d),
       end - i, beta, std::log(beta));
    });
  }
};

}  // namespace
}  // namespace twophase

STABLE_TORCH_LIBRARY_IMPL(twophase, CPU, m) {
  m.impl("softplus", TORCH_BOX(&twophase::softplus_op<twophase::Cpu>));
  m.impl("softplus_", TORCH_BOX(&twophase::softplus_inplace_op<twophase::Cpu>));
  m.impl("softplus_backward", TORCH_BOX(&twophase::softplus_backward_op<twophase::Cpu>));
  m.impl("softplus_double_backward",
         TORCH_BOX(&twophase::softplus_double_backward_op<twophase::Cpu>));
}
