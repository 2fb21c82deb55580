// What the CPU and the CUDA entries of a block share: checks, the results' memory, and the call with plain pointers.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "block/block.h"
#include "checks_torch.h"
#include "step_memory_torch.h"

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

// All checks of the arguments, and the shapes of what comes out.
class BlockChecks {
 public:
  // z: (batch, channels, height, width); gamma and beta: (channels), or (channels, height, width) for layer norm
  BlockChecks(const at::Tensor& z, const OptionalTensor& gamma, const OptionalTensor& beta, const BlockOptions& options)
      : z_(z), options_(options), per_pixel_(gamma.has_value() && gamma->dim() == 3) {
    check_tensor("block", "z", z, "z", z);
    check_images("block", "z", z);
    TORCH_CHECK_TYPE(
        z.scalar_type() == at::kFloat || z.scalar_type() == at::kDouble || z.scalar_type() == at::kBFloat16,
        "block: z must be float32, float64 or bfloat16, got ", z.scalar_type());
    check_choice("norm", options.norm, kBlockNorms);
    check_choice("activation", options.activation, kBlockActivations);
    check_choice("pool", options.pool, kBlockPools);
    TORCH_CHECK_VALUE(options.pool == kBlockNoPool || (z.sym_size(2) >= 2 && z.sym_size(3) >= 2),
                      "block: pooling needs maps of at least 2 x 2, z has ", z.sym_size(2), " x ", z.sym_size(3));
    TORCH_CHECK_VALUE(options.groups >= 1 && z.sym_size(1) % options.groups == 0, "block: ", z.sym_size(1),
                      " channels do not divide into ", options.groups, " groups");
    TORCH_CHECK_VALUE(std::isfinite(options.slope), "block: slope must be a finite number, got ", options.slope);
    TORCH_CHECK_VALUE(
        std::isfinite(options.eps) && options.eps >= 0 && (options.eps > 0 || options.norm != kBlockBatchNorm),
        "block: eps must be a finite number of at least 0, with the statistics of a batch above 0, got ", options.eps);
    TORCH_CHECK_VALUE(options.norm != kBlockNoNorm || (!gamma && !beta),
                      "block: gamma and beta need a norm, and norm is ", kBlockNoNorm);
    TORCH_CHECK_VALUE(!per_pixel_ || (options.norm == kBlockSampleNorm && options.groups == 1),
                      "block: gamma of shape (channels, height, width) is for a norm over each image in one group");
    parameter("gamma", gamma);
    parameter("beta", beta);
  }

  // The tangents that go into the block: of z, in one or two parts, and of gamma and beta.
  void tangents(const at::Tensor& zt, const OptionalTensor& zt_more, const OptionalTensor& gamma_t,
                const OptionalTensor& beta_t) const {
    TORCH_CHECK_VALUE(options_.norm != kBlockNoNorm || (!gamma_t && !beta_t),
                      "block: gamma_t and beta_t need a norm, and norm is ", kBlockNoNorm);
    images("zt", zt, z_.sym_sizes());
    if (zt_more) {
      images("zt_more", *zt_more, z_.sym_sizes());
    }
    parameter("gamma_t", gamma_t);
    parameter("beta_t", beta_t);
  }

  // Like y.
  void cotangent(const char* name, const at::Tensor& g) const { images(name, g, image_sizes(1, true)); }

  // Of `count` rows of numbers: 2, or 4 of the dual passes.
  void statistics(const at::Tensor& stats, int64_t count) const { wide("stats", stats, stats_sizes(count)); }

  // One or two images' worth of memory for each image of z, pooled or not.
  at::Tensor empty_images(int64_t count, bool is_pooled) const {
    return empty_result(image_sizes(count, is_pooled), z_.options().memory_format(at::MemoryFormat::ChannelsLast));
  }
  at::Tensor empty_stats(int64_t count) const { return at::empty_symint(stats_sizes(count), wide_options()); }

  // The gradient of gamma, or of beta; nothing without a norm.
  at::Tensor empty_gradient() const {
    return options_.norm == kBlockNoNorm ? at::empty({0}, wide_options())
                                         : at::empty_symint(parameter_sizes(), wide_options());
  }

 protected:
  at::TensorOptions wide_options() const {  // of parameters and statistics
    return z_.options().dtype(z_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  }

  c10::SymDimVector parameter_sizes() const {
    if (per_pixel_) {
      return {z_.sym_size(1), z_.sym_size(2), z_.sym_size(3)};
    }
    return {z_.sym_size(1)};
  }

  at::Tensor z_;
  BlockOptions options_;
  bool per_pixel_;

 private:
  static void check_choice(const char* name, int64_t value, int64_t count) {
    TORCH_CHECK_VALUE(value >= 0 && value < count, "block: ", name, " must be 0 to ", count - 1, ", got ", value);
  }

  c10::SymDimVector image_sizes(int64_t count, bool is_pooled) const {
    const int64_t by = is_pooled && options_.pool != kBlockNoPool ? 2 : 1;
    return {z_.sym_size(0) * count, z_.sym_size(1), z_.sym_size(2) / by, z_.sym_size(3) / by};
  }
  c10::SymDimVector stats_sizes(int64_t count) const {
    return {options_.norm == kBlockSampleNorm ? z_.sym_size(0) : c10::SymInt(1), count, z_.sym_size(1)};
  }

  void images(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef sizes) const {
    check_tensor("block", name, tensor, "z", z_);
    check_dtype("block", name, tensor, z_.scalar_type());
    check_sizes("block", name, tensor, sizes);
  }
  void wide(const char* name, const at::Tensor& tensor, c10::SymIntArrayRef sizes) const {
    check_tensor("block", name, tensor, "z", z_);
    check_dtype("block", name, tensor, c10::typeMetaToScalarType(wide_options().dtype()));
    check_sizes("block", name, tensor, sizes);
  }
  void parameter(const char* name, const OptionalTensor& tensor) const {
    if (tensor) {
      wide(name, *tensor, parameter_sizes());
    }
  }
};

// The tensors of one call, in the layout that the loops and kernels want, and the call itself.
class Block : public BlockChecks {
 public:
  Block(const at::Tensor& z, const OptionalTensor& gamma, const OptionalTensor& beta, const BlockOptions& options)
      : BlockChecks(z, gamma, beta, options) {
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
    call.per_pixel = per_pixel_;
    call.stats_count = 2;
    call.z = image(z);
    call.gamma = parameter(gamma, 1);
    call.beta = parameter(beta, 0);
  }

  // Tangents of gamma and beta are zero where they are absent.
  void set_tangents(const at::Tensor& zt, const OptionalTensor& zt_more, const OptionalTensor& gamma_t,
                    const OptionalTensor& beta_t) {
    tangents(zt, zt_more, gamma_t, beta_t);
    call.stats_count = kBlockStats;
    call.zt = image(zt);
    call.zt_more = zt_more ? image(*zt_more) : nullptr;
    call.gamma_t = parameter(gamma_t, 0);
    call.beta_t = parameter(beta_t, 0);
  }

  // The cotangent of y.
  void set_cotangent(const at::Tensor& g) {
    cotangent("g", g);
    call.g = image(g);
  }
  void set_cotangent_tangents(const at::Tensor& gt, const OptionalTensor& gt_more) {
    cotangent("gt", gt);
    call.gt = image(gt);
    if (gt_more) {
      cotangent("gt_more", *gt_more);
      call.gt_more = image(*gt_more);
    }
  }

  // (rows, 2 or 4, channels)
  void set_stats(const at::Tensor& stats) {
    statistics(stats, call.stats_count);
    call.stats = const_cast<void*>(keep(stats.contiguous()).const_data_ptr());
  }
  at::Tensor make_stats() {
    made_stats_ = empty_stats(call.stats_count);
    call.stats = made_stats_.mutable_data_ptr();
    return made_stats_;
  }

  void* half(at::Tensor& both, int64_t index) const {
    return both.narrow(0, index * call.batch, call.batch).mutable_data_ptr();
  }

  // The gradients of gamma and beta; the loops write those of layer norm with the channels last.
  void make_gradients() {
    gamma_grad_ = channels_last(empty_gradient());
    beta_grad_ = channels_last(empty_gradient());
    if (call.norm != kBlockNoNorm) {
      call.gamma_grad = gamma_grad_.mutable_data_ptr();
      call.beta_grad = beta_grad_.mutable_data_ptr();
    }
  }
  std::tuple<at::Tensor, at::Tensor> gradients() const {
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
    call.sums = keep(at::empty({call.batch, 4, call.channels}, wide_options())).mutable_data_ptr();
    call.means = keep(at::empty({block_rows(call), kBlockMeans, call.channels}, wide_options())).mutable_data_ptr();
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

  const void* image(const at::Tensor& tensor) {
    return keep(tensor.contiguous(at::MemoryFormat::ChannelsLast)).const_data_ptr();
  }

  at::Tensor channels_last(const at::Tensor& parameter) const {
    return call.per_pixel ? parameter.permute({1, 2, 0}).contiguous() : parameter.contiguous();
  }

  const void* parameter(const OptionalTensor& tensor, double otherwise) {
    const at::Tensor given = tensor ? *tensor : at::full_symint(parameter_sizes(), otherwise, wide_options());
    return keep(channels_last(given)).const_data_ptr();
  }

  const at::Tensor& keep(at::Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  at::Tensor made_stats_, gamma_grad_, beta_grad_;
  std::vector<at::Tensor> kept_;  // what the call points into
};

// --- the operators, for a device's runner
// ---------------------------------------------------------------------------------------

template <BlockRunner kRunner>
std::tuple<at::Tensor, at::Tensor> block_forward(const at::Tensor& z, const OptionalTensor& gamma,
                                                 const OptionalTensor& beta, int64_t norm, int64_t groups, double eps,
                                                 int64_t activation, double slope, int64_t pool) {
  Block block(z, gamma, beta, {norm, groups, eps, activation, slope, pool});
  at::Tensor stats = block.make_stats(), y = block.empty_images(1, true);
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
  at::Tensor gz = block.empty_images(1, false);
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
  at::Tensor stats = block.make_stats(), both = block.empty_images(2, true);
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
  at::Tensor both = block.empty_images(2, false);
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
