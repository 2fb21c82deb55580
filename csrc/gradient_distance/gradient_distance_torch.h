// What the CPU and the CUDA entries of the gradient distance share: checks, and the lists as flat memory.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "gradient_distance/gradient_distance.h"
#include "pieces_torch.h"

namespace selmatch {

inline void gradient_distance_check(at::TensorList syn, at::TensorList real, int64_t metric) {
  TORCH_CHECK_VALUE(metric >= 0 && metric < kGradientMetrics, "gradient_distance: metric must be 0, 1 or 2, got ",
                    metric);
  check_lists("gradient_distance", {{"syn", syn}, {"real", real}});
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
    for (int list = 0; list < 2; ++list) {
      for (size_t i = 0; wanted[list] && i < syn.size(); ++i) {
        gradients.push_back(counts(syn[i]) ? at::empty_like(syn[i], at::MemoryFormat::Contiguous)
                                           : at::zeros_like(syn[i], at::MemoryFormat::Contiguous));
      }
    }
  }

  // Without the tensors that count nothing.
  template <typename T>
  std::vector<GradientPiece<T>> pieces() const {
    const size_t count = inputs.size() / 2;
    std::vector<GradientPiece<T>> result;
    for (size_t i = 0; i < count; ++i) {
      if (!counts(inputs[i])) {
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

 private:
  bool counts(const at::Tensor& tensor) const { return metric != kLayerwise || tensor.dim() > 1; }
};

}  // namespace selmatch
