// The first layer of a network on the CPU, conv3x3 of an input of few channels and a block: its passes back. The
// gradient of the convolution's result, the largest tensor of a step, goes from the block's loops to the convolution's
// piece by piece and is never stored. torch_cpu.cpp includes this after both operators' own files.
#include <torch/library.h>

#include "block/block_torch.h"
#include "conv3x3/conv3x3.h"
#include "cpu_torch.h"

namespace selmatch {
namespace {

// x: (batch, 1 to 4, height, width), z: (batch, outputs, height, width); each weight, where given, (outputs, channels, 3,
// 3). Returns a weight's sizes.
c10::SymDimVector check_conv_block(const at::Tensor& x, const at::Tensor& z,
                                   std::initializer_list<std::pair<const char*, const at::Tensor*>> weights) {
  const char* op = "conv_block";
  check_tensor(op, "x", x, "z", z);
  check_images(op, "x", x);
  check_images(op, "z", z);
  check_floating(op, "z", z);
  const c10::SymInt channels = x.sym_size(1), outputs = z.sym_size(1);
  TORCH_CHECK_VALUE(channels > 0 && channels <= kConv3x3Few && outputs > 0 && outputs % kConv3x3Multiple == 0,
                    "conv_block: x must have 1 to ", kConv3x3Few, " channels and z a multiple of ", kConv3x3Multiple,
                    ", got ", channels, " and ", outputs);
  check_dtype(op, "x", x, z.scalar_type());
  check_sizes(op, "x", x, {z.sym_size(0), channels, z.sym_size(2), z.sym_size(3)});
  for (const auto& [name, weight] : weights) {
    check_tensor(op, name, *weight, "z", z);
    check_dtype(op, name, *weight, z.scalar_type());
    check_sizes(op, name, *weight, {outputs, channels, 3, 3});
  }
  return {outputs, channels, 3, 3};
}

// Runs a pass back of `block`. What is not asked for, weight_grad or x_grad_t, is undefined; without x_grad_t the
// weights are not used.
void run_pieces(Block& block, int pass, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_t,
                const at::Tensor& weight_grad, const at::Tensor& x_grad_t) {
  const at::Tensor images = x.contiguous(at::MemoryFormat::ChannelsLast);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_block", [&] {
    const auto from = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<scalar_t>() : nullptr; };
    const auto to = [](const at::Tensor& t) { return t.defined() ? t.mutable_data_ptr<scalar_t>() : nullptr; };
    const auto pieces = conv3x3_few_pieces(Conv3x3FewPiecesCall<scalar_t>{
        x.size(0), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)), static_cast<int>(x.size(1)),
        block.call.channels, from(images), to(weight_grad), from(weight), from(weight_t), to(x_grad_t)});
    block.call.taker = pieces.get();
    block.call.take = [](void* taker, int64_t image, int64_t first, int64_t count, const void* gz, const void* gzt) {
      static_cast<Conv3x3FewPieces<scalar_t>*>(taker)->add(image, first, count, static_cast<const scalar_t*>(gz),
                                                           static_cast<const scalar_t*>(gzt));
    };
    block.run(&run, pass);
    pieces->finish();
  });
}

std::tuple<Tensor, Tensor, Tensor> conv_block_backward(const Tensor& g, const Tensor& x, const Tensor& z,
                                                       const Tensor& stats, const OptionalTensor& gamma,
                                                       const OptionalTensor& beta, int64_t norm, int64_t groups,
                                                       double eps, int64_t activation, double slope, int64_t pool) {
  const c10::SymDimVector sizes = check_conv_block(x, z, {});
  Block block(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  block.set_stats(stats);
  block.set_cotangent(g);
  block.make_gradients();
  const Tensor weight_grad = at::empty_symint(sizes, z.options());
  run_pieces(block, kBlockBackward, x, {}, {}, weight_grad, {});
  return std::tuple_cat(std::make_tuple(weight_grad), block.gradients());
}

std::tuple<Tensor, Tensor, Tensor> conv_block_backward_meta(const Tensor& g, const Tensor& x, const Tensor& z,
                                                            const Tensor& stats, const OptionalTensor& gamma,
                                                            const OptionalTensor& beta, int64_t norm, int64_t groups,
                                                            double eps, int64_t activation, double slope,
                                                            int64_t pool) {
  const c10::SymDimVector sizes = check_conv_block(x, z, {});
  const BlockChecks checks(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  checks.statistics(stats, 2);
  checks.cotangent("g", g);
  return {at::empty_symint(sizes, z.options()), checks.empty_gradient(), checks.empty_gradient()};
}

// Without `weight_wanted` the second result is empty.
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_dual_backward(
    const Tensor& g, const Tensor& gt, const Tensor& x, const Tensor& weight, const Tensor& weight_t, const Tensor& z,
    const Tensor& zt, const Tensor& stats, const OptionalTensor& gamma, const OptionalTensor& beta,
    const OptionalTensor& gamma_t, const OptionalTensor& beta_t, bool weight_wanted, int64_t norm, int64_t groups,
    double eps, int64_t activation, double slope, int64_t pool) {
  const c10::SymDimVector sizes = check_conv_block(x, z, {{"weight", &weight}, {"weight_t", &weight_t}});
  Block block(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  block.set_tangents(zt, {}, gamma_t, beta_t);
  block.set_stats(stats);
  block.set_cotangent(g);
  block.set_cotangent_tangents(gt, {});
  block.make_gradients();
  const Tensor x_grad_t = at::empty_symint(x.sym_sizes(), z.options().memory_format(at::MemoryFormat::ChannelsLast));
  const Tensor weight_grad_t = weight_wanted ? at::empty_symint(sizes, z.options()) : Tensor();
  run_pieces(block, kBlockDualBackward, x, weight.contiguous(), weight_t.contiguous(), weight_grad_t, x_grad_t);
  return std::tuple_cat(std::make_tuple(x_grad_t, weight_wanted ? weight_grad_t : at::empty({0}, z.options())),
                        block.gradients());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_block_dual_backward_meta(
    const Tensor& g, const Tensor& gt, const Tensor& x, const Tensor& weight, const Tensor& weight_t, const Tensor& z,
    const Tensor& zt, const Tensor& stats, const OptionalTensor& gamma, const OptionalTensor& beta,
    const OptionalTensor& gamma_t, const OptionalTensor& beta_t, bool weight_wanted, int64_t norm, int64_t groups,
    double eps, int64_t activation, double slope, int64_t pool) {
  const c10::SymDimVector sizes = check_conv_block(x, z, {{"weight", &weight}, {"weight_t", &weight_t}});
  const BlockChecks checks(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  checks.tangents(zt, {}, gamma_t, beta_t);
  checks.statistics(stats, kBlockStats);
  checks.cotangent("g", g);
  checks.cotangent("gt", gt);
  return {at::empty_symint(x.sym_sizes(), z.options().memory_format(at::MemoryFormat::ChannelsLast)),
          weight_wanted ? at::empty_symint(sizes, z.options()) : at::empty({0}, z.options()), checks.empty_gradient(),
          checks.empty_gradient()};
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, Meta, m) {
  m.impl("conv_block_backward", &conv_block_backward_meta);
  m.impl("conv_block_dual_backward", &conv_block_dual_backward_meta);
}

TORCH_LIBRARY_IMPL(selmatch_ext, CPU, m) {
  m.impl("conv_block_backward", &conv_block_backward);
  m.impl("conv_block_dual_backward", &conv_block_dual_backward);
}

}  // namespace selmatch
