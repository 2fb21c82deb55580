// The trajectory distance on the CPU.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>

#include "distance/distance_loops.h"
#include "distance/distance_torch.h"

namespace selmatch {
namespace {

constexpr int64_t kStreamedGradientBytes = 16 << 20;  // of a gradient that goes past the caches
constexpr int64_t kRowGrain = 4;                      // rows that are worth a thread

template <typename T>
DistanceSums sum_rows(const std::vector<DistancePiece<T>>& pieces) {
  const std::vector<Part> rows = cut(pieces);
  std::vector<DistanceSums> partials(rows.size());
  at::parallel_for(0, static_cast<int64_t>(rows.size()), kRowGrain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const DistancePiece<T>& piece = pieces[rows[i].piece];
      const int64_t begin = rows[i].begin;
      partials[i] =
          distance_sums(piece.student + begin, piece.start + begin, piece.target + begin, rows[i].end - begin);
    }
  });
  DistanceSums total = {0, 0};
  for (const DistanceSums& partial : partials) {
    total.numerator += partial.numerator;
    total.denominator += partial.denominator;
  }
  return total;
}

std::tuple<at::Tensor, at::Tensor> trajectory_distance_cpu(at::TensorList student, at::TensorList start,
                                                           at::TensorList target) {
  distance_check(student, start, target);
  const DistanceTensors tensors(student, start, target, false, false, false);
  auto [value, sums] = distance_results(student);
  AT_DISPATCH_FLOATING_TYPES(student[0].scalar_type(), "trajectory_distance", [&] {
    const DistanceSums total = sum_rows(tensors.pieces<scalar_t>());
    sums.mutable_data_ptr<double>()[0] = total.numerator;
    sums.mutable_data_ptr<double>()[1] = total.denominator;
    *value.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(total.numerator / total.denominator);
  });
  return {value, sums};
}

std::vector<at::Tensor> trajectory_distance_backward_cpu(const at::Tensor& grad, const at::Tensor& sums,
                                                         at::TensorList student, at::TensorList start,
                                                         at::TensorList target, bool student_wanted, bool start_wanted,
                                                         bool target_wanted) {
  distance_backward_check(grad, sums, student, start, target);
  const DistanceTensors tensors(student, start, target, student_wanted, start_wanted, target_wanted);
  if (tensors.gradients.empty()) {
    return {};
  }
  AT_DISPATCH_FLOATING_TYPES(student[0].scalar_type(), "trajectory_distance_backward", [&] {
    const at::Tensor both = sums.contiguous();
    const double* total = both.const_data_ptr<double>();
    const auto weights = distance_weights<scalar_t>(*grad.const_data_ptr<scalar_t>(), total[0], total[1]);
    const auto pieces = tensors.pieces<scalar_t>();
    const std::vector<Part> rows = cut(pieces);
    const int64_t elements = std::accumulate(tensors.sizes.begin(), tensors.sizes.end(), int64_t{0});
    const bool streamed = elements * static_cast<int64_t>(sizeof(scalar_t)) > kStreamedGradientBytes;
    at::parallel_for(0, static_cast<int64_t>(rows.size()), kRowGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        distance_gradient(pieces[rows[i].piece], rows[i].begin, rows[i].end, weights, streamed);
      }
    });
  });
  return tensors.gradients;
}

std::tuple<at::Tensor, at::Tensor> trajectory_distance_meta(at::TensorList student, at::TensorList start,
                                                            at::TensorList target) {
  distance_check(student, start, target);
  return distance_results(student);
}

std::vector<at::Tensor> trajectory_distance_backward_meta(const at::Tensor& grad, const at::Tensor& sums,
                                                          at::TensorList student, at::TensorList start,
                                                          at::TensorList target, bool student_wanted, bool start_wanted,
                                                          bool target_wanted) {
  distance_backward_check(grad, sums, student, start, target);
  return distance_gradients(student, {student_wanted, start_wanted, target_wanted});
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, Meta, m) {
  m.impl("trajectory_distance", &trajectory_distance_meta);
  m.impl("trajectory_distance_backward", &trajectory_distance_backward_meta);
}

TORCH_LIBRARY_IMPL(selmatch_ext, CPU, m) {
  m.impl("trajectory_distance", &trajectory_distance_cpu);
  m.impl("trajectory_distance_backward", &trajectory_distance_backward_cpu);
}

}  // namespace selmatch
