// selmatch_ext::conv3x3 and its weights' gradient on the CPU: torch's side.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>

#include "checks_torch.h"
#include "conv3x3/conv3x3.h"
#include "cpu_torch.h"

namespace selmatch {
namespace {

void check(const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  check_tensor("conv3x3", name, tensor, "x", x);
  check_floating("conv3x3", "x", x);
  check_dtype("conv3x3", name, tensor, x.scalar_type());
}

// Of the convolution's input and of its result, whichever of them a call is given.
void check_channels(const c10::SymInt& inputs, const c10::SymInt& outputs) {
  const auto fits = [](const c10::SymInt& count) {
    return count > 0 && count <= (1 << 20) && count % kConv3x3Multiple == 0;
  };
  TORCH_CHECK_VALUE(fits(outputs) && (fits(inputs) || (inputs > 0 && inputs <= kConv3x3Few)),
                    "conv3x3: numbers of channels must be multiples of ", kConv3x3Multiple,
                    " up to 2^20 (of the input also 1 to 4), got ", inputs, " and ", outputs);
}

// Memory for the result, after all checks. x: (batch, channels, height, width); weight: (outputs, channels, 3, 3),
// transposed (channels, outputs, 3, 3)
at::Tensor conv3x3_result(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          bool transposed) {
  check("x", x, x);
  check("weight", weight, x);
  check_images("conv3x3", "x", x);
  check_images("conv3x3", "weight", weight);
  const c10::SymInt channels = x.sym_size(1), outputs = weight.sym_size(transposed ? 1 : 0);
  transposed ? check_channels(outputs, channels) : check_channels(channels, outputs);
  check_sizes("conv3x3", "weight", weight, {transposed ? channels : outputs, transposed ? outputs : channels, 3, 3});
  if (bias) {
    check("bias", *bias, x);
    check_sizes("conv3x3", "bias", *bias, {outputs});
  }
  return at::empty_symint({x.sym_size(0), outputs, x.sym_size(2), x.sym_size(3)},
                          x.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// The same for the gradient of the weight. g: (batch, outputs, height, width), the gradient of the convolution of x
at::Tensor conv3x3_weight_gradient_result(const at::Tensor& x, const at::Tensor& g) {
  check("x", x, x);
  check("g", g, x);
  check_images("conv3x3", "x", x);
  check_images("conv3x3", "g", g);
  check_channels(x.sym_size(1), g.sym_size(1));
  check_sizes("conv3x3", "g", g, {x.sym_size(0), g.sym_size(1), x.sym_size(2), x.sym_size(3)});
  return at::empty_symint({g.sym_size(1), x.sym_size(1), 3, 3}, x.options());
}

at::Tensor conv3x3_cpu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       bool transposed) {
  at::Tensor y = conv3x3_result(x, weight, bias, transposed);
  const int64_t channels = x.size(1), outputs = y.size(1);
  const at::Tensor images = x.contiguous(at::MemoryFormat::ChannelsLast), filters = weight.contiguous();
  const at::Tensor offsets = bias ? bias->contiguous() : at::Tensor();
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

at::Tensor conv3x3_weight_gradient_cpu(const at::Tensor& x, const at::Tensor& g) {
  at::Tensor weight = conv3x3_weight_gradient_result(x, g);
  const at::Tensor images = x.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor gradient = g.contiguous(at::MemoryFormat::ChannelsLast);
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

TORCH_LIBRARY_IMPL(selmatch_ext, Meta, m) {
  m.impl("conv3x3", &conv3x3_result);
  m.impl("conv3x3_weight_gradient", &conv3x3_weight_gradient_result);
}

TORCH_LIBRARY_IMPL(selmatch_ext, CPU, m) {
  m.impl("conv3x3", &conv3x3_cpu);
  m.impl("conv3x3_weight_gradient", &conv3x3_weight_gradient_cpu);
}

}  // namespace selmatch
