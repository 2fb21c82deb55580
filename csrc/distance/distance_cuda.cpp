// The trajectory distance on the GPU: torch's side.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

#include "distance/distance_torch.h"

namespace selmatch {
namespace {

std::tuple<at::Tensor, at::Tensor> trajectory_distance_cuda(at::TensorList student, at::TensorList start,
                                                            at::TensorList target) {
  distance_check(student, start, target);
  const c10::cuda::CUDAGuard guard(student[0].device());
  void* stream = c10::cuda::getCurrentCUDAStream().stream();
  const DistanceTensors tensors(student, start, target, false, false, false);
  auto [value, sums] = distance_results(student);
  AT_DISPATCH_FLOATING_TYPES(student[0].scalar_type(), "trajectory_distance", [&] {
    const auto pieces = tensors.pieces<scalar_t>();
    at::Tensor partials = at::empty({count_rows(pieces), 2}, sums.options());
    distance_cuda(pieces, partials.mutable_data_ptr<double>(), value.mutable_data_ptr<scalar_t>(),
                  sums.mutable_data_ptr<double>(), stream);
  });
  return {value, sums};
}

std::vector<at::Tensor> trajectory_distance_backward_cuda(const at::Tensor& grad, const at::Tensor& sums,
                                                          at::TensorList student, at::TensorList start,
                                                          at::TensorList target, bool student_wanted, bool start_wanted,
                                                          bool target_wanted) {
  distance_backward_check(grad, sums, student, start, target);
  const c10::cuda::CUDAGuard guard(student[0].device());
  void* stream = c10::cuda::getCurrentCUDAStream().stream();
  const DistanceTensors tensors(student, start, target, student_wanted, start_wanted, target_wanted);
  if (tensors.gradients.empty()) {
    return {};
  }
  AT_DISPATCH_FLOATING_TYPES(student[0].scalar_type(), "trajectory_distance_backward", [&] {
    distance_gradient_cuda(tensors.pieces<scalar_t>(), grad.const_data_ptr<scalar_t>(),
                           sums.contiguous().const_data_ptr<double>(), stream);
  });
  return tensors.gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, CUDA, m) {
  m.impl("trajectory_distance", &trajectory_distance_cuda);
  m.impl("trajectory_distance_backward", &trajectory_distance_backward_cuda);
}

}  // namespace selmatch
