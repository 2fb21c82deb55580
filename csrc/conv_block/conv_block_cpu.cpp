// The first layer of a network on the CPU: conv3x3 of an input of few channels, and the block that takes its result z.
// A piece of z is computed when the block first needs it. The gradient of z, the largest tensor of a step, goes back to
// the convolution piece by piece and is never stored. torch_cpu.cpp includes this after the files of both operators,
// of which it uses checks and pointers.
#include <torch/library.h>

#include "block/block_torch.h"
#include "conv3x3/conv3x3.h"
#include "cpu_torch.h"

namespace selmatch {
namespace {

// x: (batch, 1 to 4, height, width), z: (batch, outputs, height, width). Returns the weight's sizes.
c10::SymDimVector check_conv_block(const Tensor& x, const Tensor& z) {
  const char* op = "conv_block";
  check_tensor(op, "x", x, "z", z);
  check_images(op, "x", x);
  check_images(op, "z", z);
  check_floating(op, "z", z);
  const c10::SymInt channels = x.sym_size(1), outputs = z.sym_size(1);
  TORCH_CHECK_VALUE(channels <= kConv3x3Few, "conv_block: x must have 1 to ", kConv3x3Few, " channels, got ", channels);
  check_channels(channels, outputs);
  check_dtype(op, "x", x, z.scalar_type());
  check_sizes(op, "x", x, {z.sym_size(0), channels, z.sym_size(2), z.sym_size(3)});
  return {outputs, channels, 3, 3};
}

c10::SymDimVector check_conv_block_dual(const Tensor& x, const Tensor& z, const Tensor& weight,
                                        const Tensor& weight_t) {
  const c10::SymDimVector sizes = check_conv_block(x, z);
  const auto check_weight = [&](const char* name, const Tensor& tensor) {
    check_tensor("conv_block", name, tensor, "z", z);
    check_dtype("conv_block", name, tensor, z.scalar_type());
    check_sizes("conv_block", name, tensor, sizes);
  };
  check_weight("weight", weight);
  check_weight("weight_t", weight_t);
  return sizes;
}

// z, or both z and its tangent, not computed yet; after all checks of the convolution.
Tensor empty_z(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor z = conv3x3_result(x, weight, bias, false);
  check_conv_block(x, z);
  return z;
}
Tensor empty_z_both(const Tensor& x, const Tensor& weight, const Tensor& weight_t) {
  const Tensor both = conv3x3_dual_result(x, {}, weight, weight_t, {}, {}, false, true);
  check_conv_block(x, both.narrow_symint(0, 0, x.sym_size(0)));
  return both;
}

// What the convolution is given; what a pass does not use is null.
struct ConvolutionInputs {
  ConvolutionInputs(const Tensor& x_, const OptionalTensor& weight_, const OptionalTensor& weight_t_,
                    const OptionalTensor& bias_)
      : x(x_.contiguous(at::MemoryFormat::ChannelsLast)),
        weight(weight_, at::MemoryFormat::Contiguous),
        weight_t(weight_t_, at::MemoryFormat::Contiguous),
        bias(bias_, at::MemoryFormat::Contiguous) {}
  int size(int dim) const { return static_cast<int>(x.size(dim)); }

  Tensor x;
  Read weight, weight_t, bias;
};

// Runs a forward pass of `block`, whose z, and zt in a dual pass, the convolution writes.
void run_forward(Block& block, int pass, const ConvolutionInputs& conv, const Tensor& z, const Tensor& zt) {
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "conv_block", [&] {
    Conv3x3Call<scalar_t> call = {};
    call.batch = conv.x.size(0), call.height = conv.size(2), call.width = conv.size(3);
    call.channels = conv.size(1), call.outputs = block.call.channels;
    call.x = conv.x.const_data_ptr<scalar_t>(), call.bias = conv.bias.template at<scalar_t>();
    call.weight = conv.weight.template at<scalar_t>(), call.weight_t = conv.weight_t.template at<scalar_t>();
    call.y = result_numbers<scalar_t>(z), call.y_t = result_numbers<scalar_t>(zt);
    const auto result = conv3x3_piece_forward(call);
    block.call.convolution = result.get();
    block.call.make = [](void* convolution, int64_t image, int64_t first, int64_t count) {
      static_cast<Conv3x3PieceForward<scalar_t>*>(convolution)->compute(image, first, count);
    };
    block.run(&run, pass);
  });
}

// Runs a pass back of `block`. What is not asked for, weight_grad or x_grad_t, is undefined.
void run_backward(Block& block, int pass, const ConvolutionInputs& conv, const Tensor& weight_grad,
                  const Tensor& x_grad_t) {
  if (conv.x.numel() == 0) {  // no piece will come
    if (weight_grad.defined()) {
      weight_grad.zero_();
    }
    return block.run(&run, pass);
  }
  AT_DISPATCH_FLOATING_TYPES(conv.x.scalar_type(), "conv_block", [&] {
    const auto gradients = conv3x3_piece_backward(Conv3x3PieceBackwardCall<scalar_t>{
        conv.x.size(0), conv.size(2), conv.size(3), conv.size(1), block.call.channels,
        conv.x.const_data_ptr<scalar_t>(), result_numbers<scalar_t>(weight_grad), conv.weight.template at<scalar_t>(),
        conv.weight_t.template at<scalar_t>(), result_numbers<scalar_t>(x_grad_t)});
    block.call.convolution = gradients.get();
    block.call.take = [](void* convolution, int64_t image, int64_t first, int64_t count, const void* gz,
                         const void* gzt) {
      static_cast<Conv3x3PieceBackward<scalar_t>*>(convolution)
          ->add(image, first, count, static_cast<const scalar_t*>(gz), static_cast<const scalar_t*>(gzt));
    };
    block.run(&run, pass);
    gradients->finish();
  });
}

std::tuple<Tensor, Tensor, Tensor> conv_block_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                      const OptionalTensor& gamma, const OptionalTensor& beta,
                                                      int64_t norm, int64_t groups, double eps, int64_t activation,
                                                      double slope, int64_t pool) {
  Tensor z = empty_z(x, weight, bias);
  Block block(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  Tensor stats = block.make_stats(), y = block.empty_images(1, true);
  block.call.y = y.mutable_data_ptr();
  run_forward(block, kBlockForward, {x, weight, {}, bias}, z, {});
  return {y, z, stats};
}

std::tuple<Tensor, Tensor, Tensor> conv_block_forward_meta(const Tensor& x, const Tensor& weight,
                                                           const OptionalTensor& bias, const OptionalTensor& gamma,
                                                           const OptionalTensor& beta, int64_t norm, int64_t groups,
                                                           double eps, int64_t activation, double slope, int64_t pool) {
  Tensor z = empty_z(x, weight, bias);
  const BlockChecks checks(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  return {checks.empty_images(1, true), z, checks.empty_stats(2)};
}

std::tuple<Tensor, Tensor, Tensor> conv_block_backward(const Tensor& g, const Tensor& x, const Tensor& z,
                                                       const Tensor& stats, const OptionalTensor& gamma,
                                                       const OptionalTensor& beta, int64_t norm, int64_t groups,
                                                       double eps, int64_t activation, double slope, int64_t pool) {
  const Tensor weight_grad = at::empty_symint(check_conv_block(x, z), z.options());
  Block block(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  block.set_stats(stats);
  block.set_cotangent(g);
  block.make_gradients();
  run_backward(block, kBlockBackward, {x, {}, {}, {}}, weight_grad, {});
  return std::tuple_cat(std::make_tuple(weight_grad), block.gradients());
}

std::tuple<Tensor, Tensor, Tensor> conv_block_backward_meta(const Tensor& g, const Tensor& x, const Tensor& z,
                                                            const Tensor& stats, const OptionalTensor& gamma,
                                                            const OptionalTensor& beta, int64_t norm, int64_t groups,
                                                            double eps, int64_t activation, double slope,
                                                            int64_t pool) {
  const c10::SymDimVector sizes = check_conv_block(x, z);
  const BlockChecks checks(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  checks.statistics(stats, 2);
  checks.cotangent("g", g);
  return {at::empty_symint(sizes, z.options()), checks.empty_gradient(), checks.empty_gradient()};
}

// y and its tangent in one batch, then z and its tangent.
std::tuple<Tensor, Tensor, Tensor> conv_block_dual_forward(const Tensor& x, const Tensor& weight,
                                                           const Tensor& weight_t, const OptionalTensor& gamma,
                                                           const OptionalTensor& beta, const OptionalTensor& gamma_t,
                                                           const OptionalTensor& beta_t, int64_t norm, int64_t groups,
                                                           double eps, int64_t activation, double slope, int64_t pool) {
  Tensor z_both = empty_z_both(x, weight, weight_t);
  const int64_t batch = x.size(0);
  const Tensor z = z_both.narrow(0, 0, batch), zt = z_both.narrow(0, batch, batch);
  Block block(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  block.set_tangents(zt, {}, gamma_t, beta_t);
  Tensor stats = block.make_stats(), y_both = block.empty_images(2, true);
  block.call.y = block.half(y_both, 0);
  block.call.yt = block.half(y_both, 1);
  run_forward(block, kBlockDualForward, {x, weight, weight_t, {}}, z, zt);
  return {y_both, z_both, stats};
}

std::tuple<Tensor, Tensor, Tensor> conv_block_dual_forward_meta(
    const Tensor& x, const Tensor& weight, const Tensor& weight_t, const OptionalTensor& gamma,
    const OptionalTensor& beta, const OptionalTensor& gamma_t, const OptionalTensor& beta_t, int64_t norm,
    int64_t groups, double eps, int64_t activation, double slope, int64_t pool) {
  Tensor z_both = empty_z_both(x, weight, weight_t);
  const Tensor z = z_both.narrow_symint(0, 0, x.sym_size(0));
  const BlockChecks checks(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  checks.tangents(z, {}, gamma_t, beta_t);
  return {checks.empty_images(2, true), z_both, checks.empty_stats(kBlockStats)};
}

// Without `weight_wanted` the second result is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_dual_backward(
    const Tensor& g, const Tensor& gt, const Tensor& x, const Tensor& weight, const Tensor& weight_t, const Tensor& z,
    const Tensor& zt, const Tensor& stats, const OptionalTensor& gamma, const OptionalTensor& beta,
    const OptionalTensor& gamma_t, const OptionalTensor& beta_t, bool weight_wanted, int64_t norm, int64_t groups,
    double eps, int64_t activation, double slope, int64_t pool) {
  const c10::SymDimVector sizes = check_conv_block_dual(x, z, weight, weight_t);
  Block block(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  block.set_tangents(zt, {}, gamma_t, beta_t);
  block.set_stats(stats);
  block.set_cotangent(g);
  block.set_cotangent_tangents(gt, {});
  block.make_gradients();
  const Tensor x_grad_t = images_like(x, x.sym_sizes().vec());
  const Tensor weight_grad_t = weight_wanted ? at::empty_symint(sizes, z.options()) : Tensor();
  run_backward(block, kBlockDualBackward, {x, weight, weight_t, {}}, weight_grad_t, x_grad_t);
  return std::tuple_cat(std::make_tuple(x_grad_t, weight_wanted ? weight_grad_t : at::empty({0}, z.options())),
                        block.gradients());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_dual_backward_meta(
    const Tensor& g, const Tensor& gt, const Tensor& x, const Tensor& weight, const Tensor& weight_t, const Tensor& z,
    const Tensor& zt, const Tensor& stats, const OptionalTensor& gamma, const OptionalTensor& beta,
    const OptionalTensor& gamma_t, const OptionalTensor& beta_t, bool weight_wanted, int64_t norm, int64_t groups,
    double eps, int64_t activation, double slope, int64_t pool) {
  const c10::SymDimVector sizes = check_conv_block_dual(x, z, weight, weight_t);
  const BlockChecks checks(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  checks.tangents(zt, {}, gamma_t, beta_t);
  checks.statistics(stats, kBlockStats);
  checks.cotangent("g", g);
  checks.cotangent("gt", gt);
  return {images_like(x, x.sym_sizes().vec()),
          weight_wanted ? at::empty_symint(sizes, z.options()) : at::empty({0}, z.options()), checks.empty_gradient(),
          checks.empty_gradient()};
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, Meta, m) {
  m.impl("conv_block_forward", &conv_block_forward_meta);
  m.impl("conv_block_backward", &conv_block_backward_meta);
  m.impl("conv_block_dual_forward", &conv_block_dual_forward_meta);
  m.impl("conv_block_dual_backward", &conv_block_dual_backward_meta);
}

TORCH_LIBRARY_IMPL(selmatch_ext, CPU, m) {
  m.impl("conv_block_forward", &conv_block_forward);
  m.impl("conv_block_backward", &conv_block_backward);
  m.impl("conv_block_dual_forward", &conv_block_dual_forward);
  m.impl("conv_block_dual_backward", &conv_block_dual_backward);
}

}  // namespace selmatch
