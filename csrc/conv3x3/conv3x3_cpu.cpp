// selmatch_ext::conv3x3 and its weights' gradient on the CPU: torch's side.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>

#include "conv3x3/conv3x3.h"
#include "cpu_torch.h"

namespace selmatch {
namespace {

void check(const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  TORCH_CHECK_VALUE(tensor.dim() == 4, "conv3x3: ", name, " must have 4 dimensions, got shape ", tensor.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble,
                   "conv3x3: x must be float32 or float64, got ", x.scalar_type());
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type(), "conv3x3: ", name, " is ", tensor.scalar_type(), ", x ",
                   x.scalar_type());
}

void check_channels(int64_t channels, int64_t outputs, bool few) {
  const auto fits = [](int64_t count) { return count > 0 && count % kConv3x3Multiple == 0; };
  TORCH_CHECK_VALUE(fits(channels) && (fits(outputs) || (few && outputs > 0 && outputs <= kConv3x3Few)),
                    "conv3x3: numbers of channels must be multiples of ", kConv3x3Multiple,
                    few ? " (the input whose gradient it is may have 1 to 4)" : "", ", got ", channels, " and ",
                    outputs);
}

at::Tensor empty_images(const at::Tensor& like, int64_t channels) {
  return at::empty({like.size(0), channels, like.size(2), like.size(3)},
                   like.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// x: (batch, channels, height, width); weight: (outputs, channels, 3, 3), transposed (channels, outputs, 3, 3)
at::Tensor conv3x3_cpu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       bool transposed) {
  check("x", x, x);
  check("weight", weight, x);
  const int64_t channels = x.size(1), outputs = weight.size(transposed ? 1 : 0);
  check_channels(channels, outputs, transposed);
  TORCH_CHECK_VALUE(weight.size(transposed ? 0 : 1) == channels && weight.size(2) == 3 && weight.size(3) == 3,
                    "conv3x3: weight of shape ", weight.sizes(), " does not fit x of shape ", x.sizes());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == outputs && bias->dtype() == x.dtype()),
                    "conv3x3: bias must have shape (", outputs, ") and the dtype of x");
  const at::Tensor images = x.contiguous(at::MemoryFormat::ChannelsLast), filters = weight.contiguous();
  const at::Tensor offsets = bias ? bias->contiguous() : at::Tensor();
  at::Tensor y = empty_images(x, outputs);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv3x3", [&] {
    const Conv3x3Call<scalar_t> call = {x.size(0),
                                        static_cast<int>(x.size(2)),
                                        static_cast<int>(x.size(3)),
                                        static_cast<int>(channels),
                                        static_cast<int>(outputs),
                                        images.const_data_ptr<scalar_t>(),
                                        filters.const_data_ptr<scalar_t>(),
                                        transposed,
                                        bias ? offsets.const_data_ptr<scalar_t>() : nullptr,
                                        y.mutable_data_ptr<scalar_t>()};
    conv3x3(call, &torch_parallel);
  });
  return y;
}

// x: (batch, channels, height, width); g: (batch, outputs, height, width), the gradient of the convolution of x
at::Tensor conv3x3_weight_gradient_cpu(const at::Tensor& x, const at::Tensor& g) {
  check("x", x, x);
  check("g", g, x);
  TORCH_CHECK_VALUE(g.size(0) == x.size(0) && g.size(2) == x.size(2) && g.size(3) == x.size(3), "conv3x3: g of shape ",
                    g.sizes(), " does not fit x of shape ", x.sizes());
  check_channels(x.size(1), g.size(1), false);
  const at::Tensor images = x.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor gradient = g.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor weight = at::empty({g.size(1), x.size(1), 3, 3}, x.options());
  if (x.numel() == 0) {
    return weight.zero_();
  }
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv3x3_weight_gradient", [&] {
    const Conv3x3GradientCall<scalar_t> call = {x.size(0),
                                                static_cast<int>(x.size(2)),
                                                static_cast<int>(x.size(3)),
                                                static_cast<int>(x.size(1)),
                                                static_cast<int>(g.size(1)),
                                                images.const_data_ptr<scalar_t>(),
                                                gradient.const_data_ptr<scalar_t>(),
                                                weight.mutable_data_ptr<scalar_t>()};
    conv3x3_gradient(call, &torch_parallel);
  });
  return weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, CPU, m) {
  m.impl("conv3x3", &conv3x3_cpu);
  m.impl("conv3x3_weight_gradient", &conv3x3_weight_gradient_cpu);
}

}  // namespace selmatch
