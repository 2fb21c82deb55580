// What the CPU and the CUDA entries of a block share: checks, the results' memory, and the call with plain pointers.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "block/block.h"

namespace selmatch {

using BlockRunner = void (*)(const BlockCall& call, int pass, at::Device device);
using OptionalTensor = std::optional<at::Tensor>;

struct BlockOptions {
  int64_t norm, groups;
  double eps;
  int64_t activation;
  double slope;
  int64_t pool;
};

// The tensors of one call, in the layout that the loops and kernels want, and the call itself.
class Block {
 public:
  // z: (batch, channels, height, width); gamma and beta: (channels), or (channels, height, width) for layer norm
  Block(const at::Tensor& z, const OptionalTensor& gamma, const OptionalTensor& beta, const BlockOptions& options) {
    TORCH_CHECK_VALUE(z.dim() == 4, "block: z must have shape (batch, channels, height, width), got ", z.sizes());
    TORCH_CHECK_VALUE(options.norm >= 0 && options.norm < kBlockNorms, "block: norm must be 0 to ", kBlockNorms - 1,
                      ", got ", options.norm);
    TORCH_CHECK_VALUE(options.activation >= 0 && options.activation < kBlockActivations,
                      "block: activation must be 0 to ", kBlockActivations - 1, ", got ", options.activation);
    TORCH_CHECK_VALUE(options.pool >= 0 && options.pool < kBlockPools, "block: pool must be 0 to ", kBlockPools - 1,
                      ", got ", options.pool);
    TORCH_CHECK_VALUE(options.groups >= 1 && z.size(1) % options.groups == 0, "block: ", z.size(1),
                      " channels do not divide into ", options.groups, " groups");
    TORCH_CHECK_VALUE(options.norm != kBlockNoNorm || (!gamma && !beta),
                      "block: gamma and beta need a norm, and norm is ", kBlockNoNorm);
    TORCH_CHECK_VALUE(z.size(0) == 0 || z.numel() / z.size(0) < (int64_t{1} << 31),
                      "block: images of 2^31 elements or more");
    z_ = z;
    call.type = type_of(z);
    call.norm = static_cast<int>(options.norm);
    call.groups = static_cast<int>(options.groups);
    call.eps = options.eps;
    call.activation = static_cast<int>(options.activation);
    call.slope = options.slope;
    call.pool = static_cast<int>(options.pool);
    call.batch = z.size(0);
    call.channels = static_cast<int>(z.size(1));
    call.height = static_cast<int>(z.size(2));
    call.width = static_cast<int>(z.size(3));
    call.per_pixel = gamma.has_value() && gamma->dim() == 3;
    call.stats_count = 2;
    call.z = image("z", z, z.sizes());
    call.gamma = parameter("gamma", gamma, 1);
    call.beta = parameter("beta", beta, 0);
  }

  // The tangents that go into the block: of z, in one or two parts, and of gamma and beta (zero where absent).
  void set_tangents(const at::Tensor& zt, const OptionalTensor& zt_more, const OptionalTensor& gamma_t,
                    const OptionalTensor& beta_t) {
    TORCH_CHECK_VALUE(call.norm != kBlockNoNorm || (!gamma_t && !beta_t),
                      "block: gamma_t and beta_t need a norm, and norm is ", kBlockNoNorm);
    call.stats_count = kBlockStats;
    call.zt = image("zt", zt, z_.sizes());
    call.zt_more = zt_more ? image("zt_more", *zt_more, z_.sizes()) : nullptr;
    call.gamma_t = parameter("gamma_t", gamma_t, 0);
    call.beta_t = parameter("beta_t", beta_t, 0);
  }

  // The cotangent of y.
  void set_cotangent(const at::Tensor& g) { call.g = image("g", g, pooled()); }
  void set_cotangent_tangents(const at::Tensor& gt, const OptionalTensor& gt_more) {
    call.gt = image("gt", gt, pooled());
    call.gt_more = gt_more ? image("gt_more", *gt_more, pooled()) : nullptr;
  }

  // (rows, 2 or 4, channels)
  void set_stats(const at::Tensor& stats) {
    check_wide("stats", stats, stats_sizes());
    call.stats = const_cast<void*>(keep(stats.contiguous()).const_data_ptr());
  }
  at::Tensor make_stats() {
    made_stats_ = at::empty(stats_sizes(), options());
    call.stats = made_stats_.mutable_data_ptr();
    return made_stats_;
  }

  // One or two images' worth of memory for each image of z, pooled or not.
  at::Tensor make_images(int64_t count, bool is_pooled) const {
    auto sizes = is_pooled ? pooled() : z_.sizes().vec();
    sizes[0] *= count;
    return at::empty(sizes, z_.options().memory_format(at::MemoryFormat::ChannelsLast));
  }
  void* half(at::Tensor& both, int64_t index) const {
    return both.narrow(0, index * call.batch, call.batch).mutable_data_ptr();
  }

  // The gradients of gamma and beta, in the layout of the loops; nothing without a norm.
  void make_gradients() {
    if (call.norm != kBlockNoNorm) {
      gamma_grad_ = at::empty(parameter_sizes(), options());
      beta_grad_ = at::empty(parameter_sizes(), options());
      call.gamma_grad = gamma_grad_.mutable_data_ptr();
      call.beta_grad = beta_grad_.mutable_data_ptr();
    }
  }
  std::tuple<at::Tensor, at::Tensor> gradients() const {
    if (call.norm == kBlockNoNorm) {
      return {at::empty({0}, options()), at::empty({0}, options())};
    }
    if (call.per_pixel) {
      return {gamma_grad_.permute({2, 0, 1}).contiguous(), beta_grad_.permute({2, 0, 1}).contiguous()};
    }
    return {gamma_grad_, beta_grad_};
  }

  void run(BlockRunner runner, int pass) {
    if (z_.numel() == 0) {
      for (at::Tensor* t : {&made_stats_, &gamma_grad_, &beta_grad_}) {
        if (t->defined()) {
          t->zero_();
        }
      }
      return;
    }
    call.sums = keep(at::empty({call.batch, 4, call.channels}, options())).mutable_data_ptr();
    call.means = keep(at::empty({block_rows(call), kBlockMeans, call.channels}, options())).mutable_data_ptr();
    runner(call, pass, z_.device());
  }

  BlockCall call = {};

 private:
  static BlockType type_of(const at::Tensor& z) {
    switch (z.scalar_type()) {
      case at::kFloat:
        return BlockType::kFloat;
      case at::kDouble:
        return BlockType::kDouble;
      case at::kBFloat16:
        return BlockType::kBfloat16;
      default:
        TORCH_CHECK_TYPE(false, "block: z must be float32, float64 or bfloat16, got ", z.scalar_type());
    }
  }

  at::TensorOptions options() const {  // of parameters and statistics
    return z_.options().dtype(call.type == BlockType::kDouble ? at::kDouble : at::kFloat);
  }

  std::vector<int64_t> pooled() const {
    const int64_t by = call.pool == kBlockNoPool ? 1 : 2;
    return {call.batch, call.channels, call.height / by, call.width / by};
  }
  std::vector<int64_t> stats_sizes() const { return {block_rows(call), call.stats_count, call.channels}; }
  std::vector<int64_t> parameter_sizes() const {
    if (call.per_pixel) {
      return {call.height, call.width, call.channels};
    }
    return {call.channels};
  }

  const void* image(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) {
    TORCH_CHECK_VALUE(tensor.sizes() == sizes, "block: ", name, " must have shape ", sizes, ", got ", tensor.sizes());
    TORCH_CHECK_TYPE(tensor.scalar_type() == z_.scalar_type(), "block: ", name, " is ", tensor.scalar_type(), ", z is ",
                     z_.scalar_type());
    TORCH_CHECK_VALUE(tensor.device() == z_.device(), "block: ", name, " is on ", tensor.device(), ", z on ",
                      z_.device());
    return keep(tensor.contiguous(at::MemoryFormat::ChannelsLast)).const_data_ptr();
  }

  // Of parameters and statistics.
  void check_wide(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) const {
    TORCH_CHECK_VALUE(tensor.sizes() == sizes, "block: ", name, " must have shape ", sizes, ", got ", tensor.sizes());
    TORCH_CHECK_TYPE(tensor.scalar_type() == options().dtype(), "block: ", name, " must be ", options().dtype(),
                     ", got ", tensor.scalar_type());
    TORCH_CHECK_VALUE(tensor.device() == z_.device(), "block: ", name, " is on ", tensor.device(), ", z on ",
                      z_.device());
  }

  const void* parameter(const char* name, const OptionalTensor& tensor, double otherwise) {
    if (!tensor) {
      return keep(at::full(parameter_sizes(), otherwise, options())).const_data_ptr();
    }
    const auto expected = call.per_pixel ? std::vector<int64_t>{call.channels, call.height, call.width}
                                         : std::vector<int64_t>{call.channels};
    check_wide(name, *tensor, expected);
    return keep(call.per_pixel ? tensor->permute({1, 2, 0}).contiguous() : tensor->contiguous()).const_data_ptr();
  }

  const at::Tensor& keep(at::Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  at::Tensor z_, made_stats_, gamma_grad_, beta_grad_;
  std::vector<at::Tensor> kept_;  // what the call points into
};

// --- the operators, for a device's runner
// ---------------------------------------------------------------------------------------

template <BlockRunner kRunner>
std::tuple<at::Tensor, at::Tensor> block_forward(const at::Tensor& z, const OptionalTensor& gamma,
                                                 const OptionalTensor& beta, int64_t norm, int64_t groups, double eps,
                                                 int64_t activation, double slope, int64_t pool) {
  Block block(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  at::Tensor stats = block.make_stats(), y = block.make_images(1, true);
  block.call.y = y.mutable_data_ptr();
  block.run(kRunner, kBlockForward);
  return {y, stats};
}

template <BlockRunner kRunner>
std::tuple<at::Tensor, at::Tensor, at::Tensor> block_backward(const at::Tensor& g, const at::Tensor& z,
                                                              const at::Tensor& stats, const OptionalTensor& gamma,
                                                              const OptionalTensor& beta, int64_t norm, int64_t groups,
                                                              double eps, int64_t activation, double slope,
                                                              int64_t pool) {
  Block block(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  block.set_stats(stats);
  block.set_cotangent(g);
  at::Tensor gz = block.make_images(1, false);
  block.call.gz = gz.mutable_data_ptr();
  block.make_gradients();
  block.run(kRunner, kBlockBackward);
  return std::tuple_cat(std::make_tuple(gz), block.gradients());
}

// The result holds y for the first half of its batch, then its tangent.
template <BlockRunner kRunner>
std::tuple<at::Tensor, at::Tensor> block_dual_forward(const at::Tensor& z, const at::Tensor& zt,
                                                      const OptionalTensor& zt_more, const OptionalTensor& gamma,
                                                      const OptionalTensor& beta, const OptionalTensor& gamma_t,
                                                      const OptionalTensor& beta_t, int64_t norm, int64_t groups,
                                                      double eps, int64_t activation, double slope, int64_t pool) {
  Block block(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  block.set_tangents(zt, zt_more, gamma_t, beta_t);
  at::Tensor stats = block.make_stats(), both = block.make_images(2, true);
  block.call.y = block.half(both, 0);
  block.call.yt = block.half(both, 1);
  block.run(kRunner, kBlockDualForward);
  return {both, stats};
}

// The result holds the tangent of the gradient of z for the first half of its batch, then that gradient: against images
// that hold the value first and the tangent second, one correlation over both is the tangent of the weights' gradient.
template <BlockRunner kRunner>
std::tuple<at::Tensor, at::Tensor, at::Tensor> block_dual_backward(
    const at::Tensor& g, const at::Tensor& gt, const OptionalTensor& gt_more, const at::Tensor& z, const at::Tensor& zt,
    const OptionalTensor& zt_more, const at::Tensor& stats, const OptionalTensor& gamma, const OptionalTensor& beta,
    const OptionalTensor& gamma_t, const OptionalTensor& beta_t, int64_t norm, int64_t groups, double eps,
    int64_t activation, double slope, int64_t pool) {
  Block block(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  block.set_tangents(zt, zt_more, gamma_t, beta_t);
  block.set_stats(stats);
  block.set_cotangent(g);
  block.set_cotangent_tangents(gt, gt_more);
  at::Tensor both = block.make_images(2, false);
  block.call.gzt = block.half(both, 0);
  block.call.gz = block.half(both, 1);
  block.make_gradients();
  block.run(kRunner, kBlockDualBackward);
  return std::tuple_cat(std::make_tuple(both), block.gradients());
}

template <BlockRunner kRunner>
void block_register(torch::Library& m) {
  m.impl("block_forward", &block_forward<kRunner>);
  m.impl("block_backward", &block_backward<kRunner>);
  m.impl("block_dual_forward", &block_dual_forward<kRunner>);
  m.impl("block_dual_backward", &block_dual_backward<kRunner>);
}

}  // namespace selmatch
