// What the CPU and the CUDA entries of the gradient distance share: checks, and the lists as flat memory.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "gradient_distance/gradient_distance.h"

namespace selmatch {

inline void gradient_distance_check(at::TensorList syn, at::TensorList real, int64_t metric) {
  TORCH_CHECK_VALUE(metric >= 0 && metric < kGradientMetrics, "gradient_distance: metric must be 0, 1 or 2, got ",
                    metric);
  TORCH_CHECK_VALUE(!syn.empty(), "gradient_distance: syn has no tensors");
  TORCH_CHECK_VALUE(syn.size() == real.size(), "gradient_distance: syn has ", syn.size(), " tensors, real ",
                    real.size());
  const at::ScalarType dtype = syn[0].scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble,
                   "gradient_distance: syn must be float32 or float64, got ", dtype);
  const char* names[] = {"syn", "real"};
  const at::TensorList lists[] = {syn, real};
  for (int list = 0; list < 2; ++list) {
    for (size_t i = 0; i < syn.size(); ++i) {
      const at::Tensor& tensor = lists[list][i];
      TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "gradient_distance: ", names[list], "[", i, "] is ",
                       tensor.scalar_type(), ", syn[0] is ", dtype);
      TORCH_CHECK_VALUE(tensor.device() == syn[0].device(), "gradient_distance: ", names[list], "[", i, "] is on ",
                        tensor.device(), ", syn[0] on ", syn[0].device());
      TORCH_CHECK_VALUE(tensor.sizes() == syn[i].sizes(), "gradient_distance: ", names[list], "[", i, "] has shape ",
                        tensor.sizes(), ", syn[", i, "] ", syn[i].sizes());
    }
  }
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
        piece.rows = inputs[i].size(0);
        piece.length = piece.rows > 0 ? piece.size / piece.rows : 0;
      } else {
        piece.rows = (piece.size + kGradientChunk - 1) / kGradientChunk;
        piece.length = kGradientChunk;
      }
      result.push_back(piece);
    }
    return result;
  }

  int64_t rows() const {
    int64_t total = 0;
    for (size_t i = 0; i < inputs.size() / 2; ++i) {
      if (counts(inputs[i])) {
        total += metric == kLayerwise ? inputs[i].size(0) : (inputs[i].numel() + kGradientChunk - 1) / kGradientChunk;
      }
    }
    return total;
  }

 private:
  bool counts(const at::Tensor& tensor) const { return metric != kLayerwise || tensor.dim() > 1; }
};

}  // namespace selmatch
