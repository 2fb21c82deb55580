// selmatch_ext::conv3x3, its dual and its weights' gradient on the CPU: torch's side.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>

#include "checks_torch.h"
#include "conv3x3/conv3x3.h"
#include "cpu_torch.h"
#include "step_memory_torch.h"

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

// Checks everything and returns the result's shape. x: (batch, channels, height, width); weight: (outputs, channels, 3,
// 3), transposed (channels, outputs, 3, 3)
std::vector<c10::SymInt> check_convolution(const at::Tensor& x, const at::Tensor& weight,
                                           const std::optional<at::Tensor>& bias, bool transposed) {
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
  return {x.sym_size(0), outputs, x.sym_size(2), x.sym_size(3)};
}

at::Tensor images_like(const at::Tensor& x, const std::vector<c10::SymInt>& shape) {
  return empty_result(shape, x.options().memory_format(at::MemoryFormat::ChannelsLast));
}

// Memory for the result, after all checks.
at::Tensor conv3x3_result(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                          bool transposed) {
  return images_like(x, check_convolution(x, weight, bias, transposed));
}

// The same with tangents.
at::Tensor conv3x3_dual_result(const at::Tensor& x, const std::optional<at::Tensor>& x_t, const at::Tensor& weight,
                               const at::Tensor& weight_t, const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& bias_t, bool transposed, bool value) {
  std::vector<c10::SymInt> shape = check_convolution(x, weight, bias, transposed);
  const auto check_tangent = [&](const char* name, const at::Tensor& tangent, const at::Tensor& of) {
    check(name, tangent, x);
    check_sizes("conv3x3", name, tangent, of.sym_sizes());
  };
  if (x_t) {
    check_tangent("x_t", *x_t, x);
  }
  check_tangent("weight_t", weight_t, weight);
  if (bias_t) {
    check("bias_t", *bias_t, x);
    check_sizes("conv3x3", "bias_t", *bias_t, {shape[1]});
  }
  shape[0] = value ? 2 * shape[0] : shape[0];
  return images_like(x, shape);
}

// The same for the gradient of the weight. g: (batch, outputs, height, width), the gradient of the convolution of x
at::Tensor conv3x3_weight_gradient_result(const at::Tensor& x, const at::Tensor& g) {
  check("x", x, x);
  check("g", g, x);
  check_images("conv3x3", "x", x);
  check_images("conv3x3", "g", g);
  check_channels(x.sym_size(1), g.sym_size(1));
  check_sizes("conv3x3", "g", g, {x.sym_size(0), g.sym_size(1), x.sym_size(2), x.sym_size(3)});
  return empty_result({g.sym_size(1), x.sym_size(1), 3, 3}, x.options());
}

// A tensor's memory, in the order that the loops read; null without one.
class Read {
 public:
  Read(const at::Tensor& tensor, at::MemoryFormat format) : tensor_(tensor.contiguous(format)) {}
  Read(const std::optional<at::Tensor>& tensor, at::MemoryFormat format)
      : tensor_(tensor ? tensor->contiguous(format) : at::Tensor()) {}
  template <typename T>
  const T* at() const {
    return tensor_.defined() ? tensor_.const_data_ptr<T>() : nullptr;
  }

 private:
  at::Tensor tensor_;
};

// y and y_t: undefined where they are not asked for.
void run_convolution(const at::Tensor& x, const std::optional<at::Tensor>& x_t, const at::Tensor& weight,
                     const std::optional<at::Tensor>& weight_t, const std::optional<at::Tensor>& bias,
                     const std::optional<at::Tensor>& bias_t, bool transposed, const at::Tensor& y,
                     const at::Tensor& y_t) {
  constexpr auto kImages = at::MemoryFormat::ChannelsLast, kPlain = at::MemoryFormat::Contiguous;
  const Read image(x, kImages), image_t(x_t, kImages), filter(weight, kPlain), filter_t(weight_t, kPlain);
  const Read offset(bias, kPlain), offset_t(bias_t, kPlain);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "conv3x3", [&] {
    const auto to = [](const at::Tensor& result) {
      return result.defined() ? result.mutable_data_ptr<scalar_t>() : nullptr;
    };
    const Conv3x3Call<scalar_t> call = {x.size(0),
                                        static_cast<int>(x.size(2)),
                                        static_cast<int>(x.size(3)),
                                        static_cast<int>(x.size(1)),
                                        static_cast<int>(weight.size(transposed ? 1 : 0)),
                                        transposed,
                                        image.at<scalar_t>(),
                                        filter.at<scalar_t>(),
                                        offset.at<scalar_t>(),
                                        to(y),
                                        image_t.at<scalar_t>(),
                                        filter_t.at<scalar_t>(),
                                        offset_t.at<scalar_t>(),
                                        to(y_t)};
    conv3x3(call, &torch_parallel);
  });
}

at::Tensor conv3x3_cpu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       bool transposed) {
  at::Tensor y = conv3x3_result(x, weight, bias, transposed);
  run_convolution(x, {}, weight, {}, bias, {}, transposed, y, {});
  return y;
}

at::Tensor conv3x3_dual_cpu(const at::Tensor& x, const std::optional<at::Tensor>& x_t, const at::Tensor& weight,
                            const at::Tensor& weight_t, const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& bias_t, bool transposed, bool value) {
  at::Tensor both = conv3x3_dual_result(x, x_t, weight, weight_t, bias, bias_t, transposed, value);
  const int64_t batch = x.size(0);
  const at::Tensor y = value ? both.narrow(0, transposed ? batch : 0, batch) : at::Tensor();
  const at::Tensor y_t = value ? both.narrow(0, transposed ? 0 : batch, batch) : both;
  run_convolution(x, x_t, weight, weight_t, bias, bias_t, transposed, y, y_t);
  return both;
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
  m.impl("conv3x3_dual", &conv3x3_dual_result);
  m.impl("conv3x3_weight_gradient", &conv3x3_weight_gradient_result);
}

TORCH_LIBRARY_IMPL(selmatch_ext, CPU, m) {
  m.impl("conv3x3", &conv3x3_cpu);
  m.impl("conv3x3_dual", &conv3x3_dual_cpu);
  m.impl("conv3x3_weight_gradient", &conv3x3_weight_gradient_cpu);
}

}  // namespace selmatch
