// What the CPU and the CUDA entries of the gradient distance share: checks, and the lists as flat memory.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "checks_torch.h"
#include "gradient_distance/gradient_distance.h"

namespace selmatch {

inline void gradient_distance_check(at::TensorList syn, at::TensorList real, int64_t metric) {
  TORCH_CHECK_VALUE(metric >= 0 && metric < kGradientMetrics, "gradient_distance: metric must be 0, 1 or 2, got ",
                    metric);
  check_lists("gradient_distance", {{"syn", syn}, {"real", real}});
}

// Whether a tensor is part of the distance.
inline bool gradient_counts(const at::Tensor& tensor, int64_t metric) {
  return metric != kLayerwise || tensor.dim() > 1;
}

inline c10::SymInt gradient_rows(at::TensorList syn, int64_t metric) {
  c10::SymInt rows = 0;
  for (const at::Tensor& tensor : syn) {
    if (metric != kLayerwise) {
      rows += (tensor.sym_numel() + (kGradientChunk - 1)) / kGradientChunk;
    } else if (tensor.dim() > 1) {
      rows += tensor.sym_size(0);
    }
  }
  return rows;
}

inline void gradient_distance_backward_check(const at::Tensor& grad, const at::Tensor& sums, at::TensorList syn,
                                             at::TensorList real, int64_t metric) {
  gradient_distance_check(syn, real, metric);
  check_backward("gradient_distance_backward", grad, sums, {gradient_rows(syn, metric) + 1, 3}, syn[0]);
}

// The value, and three sums of each row, then of all.
inline std::tuple<at::Tensor, at::Tensor> gradient_distance_results(at::TensorList syn, int64_t metric) {
  const at::TensorOptions options = syn[0].options();
  return {at::empty({}, options), at::empty_symint({gradient_rows(syn, metric) + 1, 3}, options.dtype(at::kDouble))};
}

// Memory for the gradients that are wanted; zeros for tensors that count nothing.
inline std::vector<at::Tensor> gradient_distance_gradients(at::TensorList syn, int64_t metric,
                                                           std::initializer_list<bool> wanted) {
  std::vector<at::Tensor> gradients;
  for (const bool w : wanted) {
    for (size_t i = 0; w && i < syn.size(); ++i) {
      gradients.push_back(gradient_counts(syn[i], metric) ? at::empty_like(syn[i], at::MemoryFormat::Contiguous)
                                                          : at::zeros_like(syn[i], at::MemoryFormat::Contiguous));
    }
  }
  return gradients;
}

// Both lists as contiguous memory, so that a layer's rows are, and the gradients that are wanted.
struct GradientTensors {
  int64_t metric;
  std::vector<at::Tensor> inputs;     // syn's, then real's
  std::vector<at::Tensor> gradients;  // syn's, then real's: the operator's result
  bool wanted[2];

  GradientTensors(at::TensorList syn, at::TensorList real, int64_t metric, bool syn_wanted, bool real_wanted)
      : metric(metric), wanted{syn_wanted, real_wanted} {
    const at::TensorList lists[] = {syn, real};
    for (const at::TensorList& list : lists) {
      for (const at::Tensor& tensor : list) {
        inputs.push_back(tensor.contiguous());
      }
    }
    gradients = gradient_distance_gradients(syn, metric, {syn_wanted, real_wanted});
  }

  // Without the tensors that count nothing.
  template <typename T>
  std::vector<GradientPiece<T>> pieces() const {
    const size_t count = inputs.size() / 2;
    std::vector<GradientPiece<T>> result;
    for (size_t i = 0; i < count; ++i) {
      if (!gradient_counts(inputs[i], metric)) {
        continue;
      }
      GradientPiece<T> piece = {};
      piece.syn = inputs[i].const_data_ptr<T>();
      piece.real = inputs[count + i].const_data_ptr<T>();
      if (wanted[0]) {
        piece.syn_grad = gradients[i].mutable_data_ptr<T>();
      }
      if (wanted[1]) {
        piece.real_grad = gradients[wanted[0] * count + i].mutable_data_ptr<T>();
      }
      piece.size = inputs[i].numel();
      if (metric == kLayerwise) {
        piece.row_count = inputs[i].size(0);
        piece.row_length = piece.row_count > 0 ? piece.size / piece.row_count : 0;
      } else {
        piece.row_count = (piece.size + kGradientChunk - 1) / kGradientChunk;
        piece.row_length = kGradientChunk;
      }
      result.push_back(piece);
    }
    return result;
  }
};

}  // namespace selmatch
