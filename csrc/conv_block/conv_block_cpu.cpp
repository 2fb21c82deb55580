// The operators of a first layer on the CPU (conv_block.h): torch's side. torch_cpu.cpp includes this after the files
// of conv3x3 and of the block, of which it uses checks and pointers.
#include <torch/library.h>

#include "block/block_torch.h"
#include "conv3x3/conv3x3.h"
#include "conv_block/conv_block.h"
#include "cpu_torch.h"

namespace selmatch {
namespace {

using Tensor = at::Tensor;

// A tensor with z's shape and no memory for it; after all checks of the convolution.
Tensor shape_of_z(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const std::vector<c10::SymInt> sizes = check_convolution(x, weight, bias, false);
  TORCH_CHECK_VALUE(x.sym_size(1) <= kConv3x3Few, "conv_block: x must have 1 to ", kConv3x3Few, " channels, got ",
                    x.sym_size(1));
  return at::empty({1, 1, 1, 1}, x.options()).expand_symint(sizes);
}

// All checks of the arguments, and memory for what comes out.
class ConvBlockChecks : public BlockChecks {
 public:
  ConvBlockChecks(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& gamma,
                  const OptionalTensor& beta, const BlockOptions& options)
      : BlockChecks(shape_of_z(x, weight, bias), gamma, beta, options), x_(x), weight_(weight) {
    TORCH_CHECK_VALUE(options.activation == kBlockPiecewise, "conv_block: activation must be ", kBlockPiecewise,
                      ", got ", options.activation);
    TORCH_CHECK_VALUE(options.pool != kBlockMaxPool || options.slope == 0,
                      "conv_block: slope must be 0 with maximum pooling, got ", options.slope);
    TORCH_CHECK_VALUE(!per_pixel_, "conv_block: gamma and beta must have shape (channels)");
    const bool centers =
        options.norm == kBlockBatchNorm || (options.norm == kBlockSampleNorm && weight.sym_size(0) == options.groups);
    TORCH_CHECK_VALUE(!bias || centers,
                      "conv_block: bias must be None where no norm subtracts it again, as batch and instance norm do");
  }

  void tangents(const Tensor& weight_t, const OptionalTensor& gamma_t, const OptionalTensor& beta_t) const {
    like("weight_t", weight_t, x_.scalar_type(), weight_.sym_sizes());
    BlockChecks::tangents(z_, {}, gamma_t, beta_t);
  }
  void saved(const Tensor& bits, const Tensor& moments) const {
    like("bits", bits, word(), bits_sizes());
    like("moments", moments, at::kDouble, moments_sizes());
  }

  Tensor empty_bits() const { return empty_result(bits_sizes(), x_.options().dtype(word())); }
  Tensor empty_moments() const { return at::empty_symint(moments_sizes(), exact()); }
  Tensor empty_exact_stats() const { return at::empty_symint({rows(), 2, weight_.sym_size(0)}, exact()); }
  Tensor empty_weight() const { return at::empty_symint(weight_.sym_sizes(), x_.options()); }
  Tensor empty_x() const { return images_like(x_, x_.sym_sizes().vec()); }

 private:
  void like(const char* name, const Tensor& given, at::ScalarType dtype, c10::SymIntArrayRef sizes) const {
    check_tensor("conv_block", name, given, "x", x_);
    check_dtype("conv_block", name, given, dtype);
    check_sizes("conv_block", name, given, sizes);
  }

  at::TensorOptions exact() const { return x_.options().dtype(at::kDouble); }
  at::ScalarType word() const { return x_.scalar_type() == at::kDouble ? at::kLong : at::kInt; }
  c10::SymInt rows() const { return options_.norm == kBlockSampleNorm ? x_.sym_size(0) : c10::SymInt(1); }
  c10::SymDimVector moments_sizes() const {
    const c10::SymInt length = 9 * x_.sym_size(1) + 1;
    return {rows(), length, length};
  }
  c10::SymDimVector bits_sizes() const {
    const c10::SymInt height = x_.sym_size(2), width = x_.sym_size(3);
    const c10::SymInt pixels = options_.pool == kBlockNoPool ? height * width : (height / 2) * (width / 2) * 4;
    return {x_.sym_size(0), (pixels + (kConvBlockPixels - 1)) / kConvBlockPixels, weight_.sym_size(0)};
  }

  Tensor x_, weight_;
};

// The tensors of one call, and the call itself.
template <typename T>
class ConvBlock {
 public:
  ConvBlock(const Tensor& x, const Tensor& weight, const OptionalTensor& gamma, const OptionalTensor& beta,
            const BlockOptions& options) {
    call.norm = static_cast<int>(options.norm), call.groups = static_cast<int>(options.groups);
    call.eps = options.eps, call.slope = static_cast<T>(options.slope), call.pool = static_cast<int>(options.pool);
    call.batch = x.size(0), call.channels = static_cast<int>(x.size(1));
    call.outputs = static_cast<int>(weight.size(0));
    call.height = static_cast<int>(x.size(2)), call.width = static_cast<int>(x.size(3));
    call.x = images(x), call.weight = numbers(weight), call.gamma = numbers(gamma), call.beta = numbers(beta);
  }

  void set_tangents(const Tensor& weight_t, const OptionalTensor& gamma_t, const OptionalTensor& beta_t) {
    call.weight_t = numbers(weight_t), call.gamma_t = numbers(gamma_t), call.beta_t = numbers(beta_t);
  }
  void set_saved(const Tensor& bits, const Tensor& moments) {
    call.bits = const_cast<Word*>(static_cast<const Word*>(keep(bits.contiguous()).const_data_ptr()));
    call.moments = const_cast<double*>(keep(moments.contiguous()).template const_data_ptr<double>());
  }
  void set_results(const Tensor& bits, const Tensor& moments, const Tensor& stats) {
    call.bits = static_cast<Word*>(bits.mutable_data_ptr());
    call.moments = moments.mutable_data_ptr<double>();
    call.stats = stats.mutable_data_ptr<double>();
  }
  // results: for the gradients of weight, gamma and beta
  void set_gradients(const std::tuple<Tensor, Tensor, Tensor>& results) {
    call.weight_grad = std::get<0>(results).template mutable_data_ptr<T>();
    call.gamma_grad = std::get<1>(results).template mutable_data_ptr<T>();
    call.beta_grad = std::get<2>(results).template mutable_data_ptr<T>();
  }
  const T* images(const Tensor& tensor) {
    return keep(tensor.contiguous(at::MemoryFormat::ChannelsLast)).template const_data_ptr<T>();
  }
  void run(int pass) { conv_block(call, pass, &torch_parallel); }

  ConvBlockCall<T> call = {};

 private:
  using Word = typename ConvBlockCall<T>::Word;

  const T* numbers(const OptionalTensor& tensor) {
    return tensor ? keep(tensor->contiguous()).template const_data_ptr<T>() : nullptr;
  }
  const Tensor& keep(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return kept_.back();
  }

  std::vector<Tensor> kept_;  // what the call points into
};

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four conv_block_forward_meta(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& gamma, const OptionalTensor& beta, int64_t norm, int64_t groups,
                             double eps, int64_t activation, double slope, int64_t pool) {
  const ConvBlockChecks checks(x, weight, bias, gamma, beta, {norm, groups, eps, activation, slope, pool});
  return {checks.empty_images(1, true), checks.empty_bits(), checks.empty_moments(), checks.empty_exact_stats()};
}

// y; and bits, moments and statistics, which the pass back takes.
Four conv_block_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& gamma,
                        const OptionalTensor& beta, int64_t norm, int64_t groups, double eps, int64_t activation,
                        double slope, int64_t pool) {
  const Four results =
      conv_block_forward_meta(x, weight, bias, gamma, beta, norm, groups, eps, activation, slope, pool);
  const Tensor &y = std::get<0>(results), &moments = std::get<2>(results), &stats = std::get<3>(results);
  if (x.numel() == 0) {
    moments.zero_(), stats.zero_();
    return results;
  }
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_block_forward", [&] {
    ConvBlock<scalar_t> block(x, weight, gamma, beta, {norm, groups, eps, activation, slope, pool});
    block.set_results(std::get<1>(results), moments, stats);
    block.call.y = y.mutable_data_ptr<scalar_t>();
    block.run(kBlockForward);
  });
  if (bias) {
    stats.select(1, 0).add_(*bias);
  }
  return results;
}

Three conv_block_backward_meta(const Tensor& g, const Tensor& x, const Tensor& weight, const Tensor& bits,
                               const Tensor& moments, const OptionalTensor& gamma, const OptionalTensor& beta,
                               int64_t norm, int64_t groups, double eps, int64_t activation, double slope,
                               int64_t pool) {
  const ConvBlockChecks checks(x, weight, {}, gamma, beta, {norm, groups, eps, activation, slope, pool});
  checks.cotangent("g", g);
  checks.saved(bits, moments);
  return {checks.empty_weight(), checks.empty_gradient(), checks.empty_gradient()};
}

// The gradients of weight, gamma and beta.
Three conv_block_backward(const Tensor& g, const Tensor& x, const Tensor& weight, const Tensor& bits,
                          const Tensor& moments, const OptionalTensor& gamma, const OptionalTensor& beta, int64_t norm,
                          int64_t groups, double eps, int64_t activation, double slope, int64_t pool) {
  const Three results =
      conv_block_backward_meta(g, x, weight, bits, moments, gamma, beta, norm, groups, eps, activation, slope, pool);
  const auto& [of_weight, of_gamma, of_beta] = results;
  if (x.numel() == 0) {
    of_weight.zero_(), of_gamma.zero_(), of_beta.zero_();
    return results;
  }
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_block_backward", [&] {
    ConvBlock<scalar_t> block(x, weight, gamma, beta, {norm, groups, eps, activation, slope, pool});
    block.set_saved(bits, moments);
    block.set_gradients(results);
    block.call.g = block.images(g);
    block.run(kBlockBackward);
  });
  return results;
}

Three conv_block_dual_forward_meta(const Tensor& x, const Tensor& weight, const Tensor& weight_t,
                                   const OptionalTensor& gamma, const OptionalTensor& beta,
                                   const OptionalTensor& gamma_t, const OptionalTensor& beta_t, int64_t norm,
                                   int64_t groups, double eps, int64_t activation, double slope, int64_t pool) {
  const ConvBlockChecks checks(x, weight, {}, gamma, beta, {norm, groups, eps, activation, slope, pool});
  checks.tangents(weight_t, gamma_t, beta_t);
  return {checks.empty_images(2, true), checks.empty_bits(), checks.empty_moments()};
}

// y and its tangent in one batch; and bits and moments.
Three conv_block_dual_forward(const Tensor& x, const Tensor& weight, const Tensor& weight_t,
                              const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& gamma_t,
                              const OptionalTensor& beta_t, int64_t norm, int64_t groups, double eps,
                              int64_t activation, double slope, int64_t pool) {
  const Three results = conv_block_dual_forward_meta(x, weight, weight_t, gamma, beta, gamma_t, beta_t, norm, groups,
                                                     eps, activation, slope, pool);
  const Tensor &y = std::get<0>(results), &moments = std::get<2>(results);
  if (x.numel() == 0) {
    moments.zero_();
    return results;
  }
  const Tensor stats = at::empty({moments.size(0), 2, weight.size(0)}, moments.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_block_dual_forward", [&] {
    ConvBlock<scalar_t> block(x, weight, gamma, beta, {norm, groups, eps, activation, slope, pool});
    block.set_tangents(weight_t, gamma_t, beta_t);
    block.set_results(std::get<1>(results), moments, stats);
    block.call.y = y.mutable_data_ptr<scalar_t>();
    block.call.yt = block.call.y + y.numel() / 2;
    block.run(kBlockDualForward);
  });
  return results;
}

Four conv_block_dual_backward_meta(const Tensor& g, const Tensor& gt, const Tensor& x, const Tensor& weight,
                                   const Tensor& weight_t, const Tensor& bits, const Tensor& moments,
                                   const OptionalTensor& gamma, const OptionalTensor& beta,
                                   const OptionalTensor& gamma_t, const OptionalTensor& beta_t, bool x_wanted,
                                   int64_t norm, int64_t groups, double eps, int64_t activation, double slope,
                                   int64_t pool) {
  const ConvBlockChecks checks(x, weight, {}, gamma, beta, {norm, groups, eps, activation, slope, pool});
  checks.tangents(weight_t, gamma_t, beta_t);
  checks.cotangent("g", g);
  checks.cotangent("gt", gt);
  checks.saved(bits, moments);
  return {checks.empty_weight(), checks.empty_gradient(), checks.empty_gradient(),
          x_wanted ? checks.empty_x() : at::empty({0}, x.options())};
}

// The tangents of the gradients of weight, gamma, beta and x; the last is empty where it is not wanted.
Four conv_block_dual_backward(const Tensor& g, const Tensor& gt, const Tensor& x, const Tensor& weight,
                              const Tensor& weight_t, const Tensor& bits, const Tensor& moments,
                              const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& gamma_t,
                              const OptionalTensor& beta_t, bool x_wanted, int64_t norm, int64_t groups, double eps,
                              int64_t activation, double slope, int64_t pool) {
  const Four results = conv_block_dual_backward_meta(g, gt, x, weight, weight_t, bits, moments, gamma, beta, gamma_t,
                                                     beta_t, x_wanted, norm, groups, eps, activation, slope, pool);
  const auto& [of_weight, of_gamma, of_beta, of_x] = results;
  const Three of_parameters = {of_weight, of_gamma, of_beta};
  if (x.numel() == 0) {
    of_weight.zero_(), of_gamma.zero_(), of_beta.zero_();
    return results;
  }
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv_block_dual_backward", [&] {
    ConvBlock<scalar_t> block(x, weight, gamma, beta, {norm, groups, eps, activation, slope, pool});
    block.set_tangents(weight_t, gamma_t, beta_t);
    block.set_saved(bits, moments);
    block.set_gradients(of_parameters);
    block.call.g = block.images(g), block.call.gt = block.images(gt);
    block.call.x_grad_t = x_wanted ? std::get<3>(results).mutable_data_ptr<scalar_t>() : nullptr;
    block.run(kBlockDualBackward);
  });
  return results;
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
