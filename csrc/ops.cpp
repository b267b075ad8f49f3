// The schema of every operator. Kernels register themselves in csrc/cpu/<op>.cpp and
// csrc/cuda/<op>.cu; autograd, fake kernels and argument types live in twophase_ext/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(twophase, m) {
  m.def("softplus(Tensor x, float beta) -> Tensor");
  m.def("softplus_(Tensor(a!) x, float beta) -> ()");
  m.def("softplus_backward(Tensor grad, Tensor y, float beta) -> Tensor");
  m.def(
      "softplus_double_backward(Tensor grad_grad, Tensor grad, Tensor y, float beta)"
      " -> (Tensor, Tensor)");
  // kernel, stride, padding, dilation: a number for each of x's last 1 to 3 dimensions.
  m.def(
      "smooth_max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation,"
      " bool ceil_mode, float beta) -> Tensor");
  m.def(
      "smooth_max_pool_backward(Tensor grad, Tensor x, int[] kernel, int[] stride, int[] padding,"
      " int[] dilation, bool ceil_mode, float beta) -> Tensor");
  // keys: the 64-bit Philox key of each tensor, as a signed integer.
  m.def("perturb_(Tensor(a!)[] tensors, int[] keys, float[] stds) -> ()");
  // nu: 0 leaves a tensor and its buffer alone; empty: all 1. is_first_step: 1 where the buffer
  // holds nothing yet; empty: all 0. buffers is empty where momentum is 0.
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] buffers, int[] nu, int[] "
      "is_first_step,"
      " float lr, float momentum, float dampening, float weight_decay, bool nesterov,"
      " bool maximize) -> ()");
  // loss: 0 cross-entropy (target int64 [b]), 1 squared error (target [b, k]).
  m.def(
      "last_layer_step_(Tensor(a!) weight, Tensor(b!)? bias, Tensor(c!)? weight_buffer,"
      " Tensor(d!)? bias_buffer, Tensor h, Tensor target, int loss, float lr, float momentum,"
      " float dampening, float weight_decay, bool nesterov, bool is_first_step) -> Tensor");
  // Step s of many takes the rows order[bounds[s] : bounds[s + 1]] of h, with lr[s] or the one lr.
  m.def(
      "last_layer_epoch_(Tensor(a!) weight, Tensor(b!)? bias, Tensor(c!)? weight_buffer,"
      " Tensor(d!)? bias_buffer, Tensor h, Tensor target, Tensor order, int[] bounds, int loss,"
      " float[] lr, float momentum, float dampening, float weight_decay, bool nesterov, bool "
      "is_first_step,"
      " bool mapped) -> Tensor");
  // Mean loss and its gradients by weight and bias over all rows of h.
  m.def(
      "last_layer_gradient(Tensor weight, Tensor? bias, Tensor h, Tensor target, int loss)"
      " -> (Tensor, Tensor, Tensor)");
  // The two halves of a step over rows `index` of some columns of h. logits: float64 [b, k],
  // without the bias; the caller adds up those of all columns and hands them to the update.
  m.def("last_layer_logits(Tensor weight, Tensor h, Tensor index) -> Tensor");
  m.def(
      "last_layer_update_(Tensor(a!) weight, Tensor(b!)? bias, Tensor(c!)? weight_buffer,"
      " Tensor(d!)? bias_buffer, Tensor h, Tensor index, Tensor logits, Tensor target, int loss,"
      " float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool "
      "is_first_step)"
      " -> Tensor");
  // (certified rank [b], logabsdet [b], info [b]) of the Gram matrix of [features, 1], [b, n, m].
  m.def(
      "gram_logdet(Tensor features, bool append_ones) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // (largest product of each row [m], its column [m], pairs [k, 2] above the column's threshold,
  // not all where they are more than `most`); panels [p, d, 32]: the columns, 32 at a time.
  m.def(
      "screen_products(Tensor rows, Tensor panels, Tensor threshold, int most)"
      " -> (Tensor, Tensor, Tensor)");
  // Squares of the columns of L^-1, [n]: L sparse and lower triangular, row by row.
  m.def("triangular_inverse_squares(Tensor starts, Tensor columns, Tensor values) -> Tensor");
}
