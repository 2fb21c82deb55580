// The gradient distance on the CPU.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "gradient_distance/gradient_distance_loops.h"
#include "gradient_distance/gradient_distance_torch.h"

namespace selmatch {
namespace {

// Rows that are worth a thread.
template <typename T>
int64_t grain(const std::vector<GradientPiece<T>>& pieces, const std::vector<Part>& rows) {
  int64_t elements = 0;
  for (const GradientPiece<T>& piece : pieces) {
    elements += piece.size;
  }
  const int64_t count = static_cast<int64_t>(rows.size());
  return 1 + 4 * kGradientChunk * count / (elements + 1);
}

std::tuple<at::Tensor, at::Tensor> gradient_distance_cpu(at::TensorList syn, at::TensorList real, int64_t metric) {
  gradient_distance_check(syn, real, metric);
  const GradientTensors tensors(syn, real, metric, false, false);
  auto results = gradient_distance_results(syn, metric);
  at::Tensor& value = std::get<0>(results);
  AT_DISPATCH_FLOATING_TYPES(syn[0].scalar_type(), "gradient_distance", [&] {
    const auto pieces = tensors.pieces<scalar_t>();
    const std::vector<Part> rows = cut(pieces);
    const int64_t count = static_cast<int64_t>(rows.size());
    auto* row_sums = reinterpret_cast<GradientSums*>(std::get<1>(results).mutable_data_ptr<double>());
    at::parallel_for(0, count, grain(pieces, rows), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const GradientPiece<scalar_t>& piece = pieces[rows[i].piece];
        row_sums[i] = gradient_sums(static_cast<int>(metric), piece.syn + rows[i].begin, piece.real + rows[i].begin,
                                    rows[i].end - rows[i].begin);
      }
    });
    *value.mutable_data_ptr<scalar_t>() =
        static_cast<scalar_t>(gradient_total(static_cast<int>(metric), row_sums, count, row_sums + count));
  });
  return results;
}

std::vector<at::Tensor> gradient_distance_backward_cpu(const at::Tensor& grad, const at::Tensor& sums,
                                                       at::TensorList syn, at::TensorList real, int64_t metric,
                                                       bool syn_wanted, bool real_wanted) {
  gradient_distance_backward_check(grad, sums, syn, real, metric);
  const GradientTensors tensors(syn, real, metric, syn_wanted, real_wanted);
  if (tensors.gradients.empty()) {
    return {};
  }
  const at::Tensor dense = sums.contiguous();
  const auto* row_sums = reinterpret_cast<const GradientSums*>(dense.const_data_ptr<double>());
  AT_DISPATCH_FLOATING_TYPES(syn[0].scalar_type(), "gradient_distance_backward", [&] {
    const double upper = *grad.const_data_ptr<scalar_t>();
    const auto pieces = tensors.pieces<scalar_t>();
    const std::vector<Part> rows = cut(pieces);
    const int64_t count = static_cast<int64_t>(rows.size());
    at::parallel_for(0, count, grain(pieces, rows), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const auto weights =
            gradient_weights<scalar_t>(static_cast<int>(metric), upper, row_sums[metric == kLayerwise ? i : count]);
        gradient_distance_gradient(pieces[rows[i].piece], static_cast<int>(metric), rows[i].begin, rows[i].end,
                                   weights);
      }
    });
  });
  return tensors.gradients;
}

std::tuple<at::Tensor, at::Tensor> gradient_distance_meta(at::TensorList syn, at::TensorList real, int64_t metric) {
  gradient_distance_check(syn, real, metric);
  return gradient_distance_results(syn, metric);
}

std::vector<at::Tensor> gradient_distance_backward_meta(const at::Tensor& grad, const at::Tensor& sums,
                                                        at::TensorList syn, at::TensorList real, int64_t metric,
                                                        bool syn_wanted, bool real_wanted) {
  gradient_distance_backward_check(grad, sums, syn, real, metric);
  return gradient_distance_gradients(syn, metric, {syn_wanted, real_wanted});
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, Meta, m) {
  m.impl("gradient_distance", &gradient_distance_meta);
  m.impl("gradient_distance_backward", &gradient_distance_backward_meta);
}

TORCH_LIBRARY_IMPL(selmatch_ext, CPU, m) {
  m.impl("gradient_distance", &gradient_distance_cpu);
  m.impl("gradient_distance_backward", &gradient_distance_backward_cpu);
}

}  // namespace selmatch
