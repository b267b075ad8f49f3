// Checks and memory layout of the smooth maximum over pooling windows, for any backend that
// provides
//   forward(like, windows, dtype, x, y, beta) and backward(like, windows, dtype, grad, x, out,
//   beta)
// over contiguous memory of five dimensions; `like` names the device.
#pragma once

#include <cmath>
#include <vector>

#include "check.h"
#include "math/windows.h"

namespace twophase {

struct SmoothMaxPool {
  Dtype dtype;
  Windows windows;
  Tensor x;  // packed
  bool channels_last;
  std::vector<int64_t> shape;  // of the result
};

inline void require_each(const std::vector<int64_t>& values, const char* name, size_t axes,
                         int64_t least) {
  require(values.size() == axes, name, ": expected ", axes, " numbers, one a dimension, got ",
          values.size());
  for (const int64_t value : values)
    require(value >= least && value < int64_t{1} << 31, name, ": expected numbers from ", least,
            ", got ", value);
}

// Are the channels of a pixel side by side, and pixels, rows and images further and further apart?
// As torch tells its formats channels_last and channels_last_3d by strides.
inline bool is_channels_last(const Tensor& x) {
  int64_t reached = 0;
  for (int64_t k = 0; k < x.dim(); ++k) {
    const int64_t d = k == 0 ? 1 : k == x.dim() - 1 ? 0 : x.dim() - k;
    if (x.size(d) == 0 || x.stride(d) == 0 || x.stride(d) < reached) return false;
    if (d == 0 && reached == x.stride(1)) return false;  // nothing tells: one channel, one pixel
    reached = x.stride(d) * x.size(d);
  }
  return true;
}

inline std::vector<int64_t> shape_vector(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < x.dim(); ++d) sizes.push_back(x.size(d));
  return sizes;
}

// An empty tensor of this shape, the dimension of channels in memory last or in its place.
inline Tensor empty_images(const Tensor& like, std::vector<int64_t> shape, bool channels_last) {
  if (!channels_last) return torch::stable::new_empty(like, shape);
  shape.push_back(shape[1]);
  shape.erase(shape.begin() + 1);
  Tensor result = torch::stable::new_empty(like, shape);
  const int64_t last = result.dim() - 1;
  for (int64_t d = 1; d < last; ++d) result = torch::stable::transpose(result, d, last);
  return result;
}

inline SmoothMaxPool checked_pool(const Tensor& x, const std::vector<int64_t>& kernel,
                                  const std::vector<int64_t>& stride,
                                  const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, bool ceil_mode,
                                  double beta) {
  const int64_t axes = static_cast<int64_t>(kernel.size());
  require(axes >= 1 && axes <= 3, "kernel: expected 1 to 3 numbers, got ", axes);
  require_each(kernel, "kernel", axes, 1);
  require_each(stride, "stride", axes, 1);
  require_each(padding, "padding", axes, 0);
  require_each(dilation, "dilation", axes, 1);
  require(std::isfinite(beta) && beta >= 1e-30 && beta <= 1e30,
          "beta: expected a number between 1e-30 and 1e30, got ", beta);
  require(x.dim() == axes + 1 || x.dim() == axes + 2, "x: expected ", axes + 1, " or ", axes + 2,
          " dimensions, got ", x.dim());
  SmoothMaxPool pool{dtype_of(x, "x"), {}, x, false, {}};
  pool.channels_last = axes > 1 && x.dim() == axes + 2 && !x.is_contiguous() && is_channels_last(x);
  const Tensor packed =
      empty_images(x, shape_vector(x), pool.channels_last);  // not touched where x is
  pool.x = in_layout_of(x, packed);

  Windows& w = pool.windows;
  for (int d = 0; d < kWindowDims; ++d)
    w.in[d] = w.out[d] = w.kernel[d] = w.stride[d] = w.dilation[d] = 1;
  const int64_t outer = x.dim() - axes;
  for (int64_t d = 0; d < outer; ++d) pool.shape.push_back(x.size(d));
  if (pool.channels_last) {
    w.in[0] = x.size(0), w.in[kWindowDims - 1] = x.size(1);
  } else {
    for (int64_t d = 0; d < outer; ++d) w.in[0] *= x.size(d);
  }
  const int64_t first = kWindowDims - axes - pool.channels_last;
  for (int64_t a = 0; a < axes; ++a) {
    const int64_t size = x.size(outer + a), d = first + a;
    const int64_t span = dilation[a] * (kernel[a] - 1) + 1;
    require(2 * padding[a] <= kernel[a], "padding: expected at most half of the kernel size ",
            kernel[a], ", got ", padding[a]);
    const int64_t room = size + 2 * padding[a] - span;
    require(size < int64_t{1} << 31, "x: expected less than 2^31 numbers in dimension ", outer + a);
    require(size > 0 && room >= 0, "x: expected at least ", span - 2 * padding[a],
            " numbers in dimension ", outer + a, ", got ", size);
    int64_t count = (room + (ceil_mode ? stride[a] - 1 : 0)) / stride[a] + 1;
    // not a window that begins in the padding behind
    if (ceil_mode && (count - 1) * stride[a] >= size + padding[a]) --count;
    w.in[d] = size, w.kernel[d] = kernel[a], w.stride[d] = stride[a];
    w.padding[d] = padding[a], w.dilation[d] = dilation[a];
    w.out[d] = count;
    pool.shape.push_back(count);
  }
  w.out[0] = w.in[0];
  if (pool.channels_last) w.out[kWindowDims - 1] = w.in[kWindowDims - 1];
  return pool;
}

template <class Backend>
Tensor smooth_max_pool_op(const Tensor& x, std::vector<int64_t> kernel, std::vector<int64_t> stride,
                          std::vector<int64_t> padding, std::vector<int64_t> dilation,
                          bool ceil_mode, double beta) {
  const SmoothMaxPool pool = checked_pool(x, kernel, stride, padding, dilation, ceil_mode, beta);
  Tensor y = empty_images(pool.x, pool.shape, pool.channels_last);
  if (y.numel() > 0)
    Backend::forward(pool.x, pool.windows, pool.dtype, pool.x.const_data_ptr(),
                     y.mutable_data_ptr(), beta);
  return y;
}

template <class Backend>
Tensor smooth_max_pool_backward_op(const Tensor& grad, const Tensor& x, std::vector<int64_t> kernel,
                                   std::vector<int64_t> stride, std::vector<int64_t> padding,
                                   std::vector<int64_t> dilation, bool ceil_mode, double beta) {
  const SmoothMaxPool pool = checked_pool(x, kernel, stride, padding, dilation, ceil_mode, beta);
  const Tensor y =
      empty_images(pool.x, pool.shape, pool.channels_last);  // its memory is never touched
  require_same_shape(grad, "grad", y, "the result");
  const Tensor g = in_layout_of(grad, y);
  Tensor out = empty_images(pool.x, shape_vector(x), pool.channels_last);
  if (y.numel() > 0)
    Backend::backward(pool.x, pool.windows, pool.dtype, g.const_data_ptr(), pool.x.const_data_ptr(),
                      out.mutable_data_ptr(), beta);
  return out;
}

}  // namespace twophase
