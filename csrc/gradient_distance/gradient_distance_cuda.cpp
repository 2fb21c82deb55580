// The gradient distance on the GPU: torch's side.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "gradient_distance/gradient_distance_torch.h"

namespace selmatch {
namespace {

std::tuple<at::Tensor, at::Tensor> gradient_distance_on_cuda(at::TensorList syn, at::TensorList real, int64_t metric) {
  gradient_distance_check(syn, real, metric);
  const c10::cuda::CUDAGuard guard(syn[0].device());
  void* stream = c10::cuda::getCurrentCUDAStream().stream();
  const GradientTensors tensors(syn, real, metric, false, false);
  auto results = gradient_distance_results(syn, metric);
  AT_DISPATCH_FLOATING_TYPES(syn[0].scalar_type(), "gradient_distance", [&] {
    gradient_distance_cuda(tensors.pieces<scalar_t>(), static_cast<int>(metric),
                           std::get<1>(results).mutable_data_ptr<double>(),
                           std::get<0>(results).mutable_data_ptr<scalar_t>(), stream);
  });
  return results;
}

std::vector<at::Tensor> gradient_distance_backward_on_cuda(const at::Tensor& grad, const at::Tensor& sums,
                                                           at::TensorList syn, at::TensorList real, int64_t metric,
                                                           bool syn_wanted, bool real_wanted) {
  gradient_distance_backward_check(grad, sums, syn, real, metric);
  const c10::cuda::CUDAGuard guard(syn[0].device());
  void* stream = c10::cuda::getCurrentCUDAStream().stream();
  const GradientTensors tensors(syn, real, metric, syn_wanted, real_wanted);
  if (tensors.gradients.empty()) {
    return {};
  }
  AT_DISPATCH_FLOATING_TYPES(syn[0].scalar_type(), "gradient_distance_backward", [&] {
    gradient_distance_gradient_cuda(tensors.pieces<scalar_t>(), static_cast<int>(metric),
                                    grad.const_data_ptr<scalar_t>(), sums.contiguous().const_data_ptr<double>(),
                                    stream);
  });
  return tensors.gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, CUDA, m) {
  m.impl("gradient_distance", &gradient_distance_on_cuda);
  m.impl("gradient_distance_backward", &gradient_distance_backward_on_cuda);
}

}  // namespace selmatch
