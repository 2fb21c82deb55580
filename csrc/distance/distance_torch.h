// What the CPU and the CUDA entries of the trajectory distance share: checks, and the lists as flat memory.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
#include <tuple>
#include <vector>

#include "checks_torch.h"
#include "distance/distance.h"

namespace selmatch {

inline void distance_check(at::TensorList student, at::TensorList start, at::TensorList target) {
  check_lists("trajectory_distance", {{"student", student}, {"start", start}, {"target", target}});
}

inline void distance_backward_check(const at::Tensor& grad, const at::Tensor& sums, at::TensorList student,
                                    at::TensorList start, at::TensorList target) {
  distance_check(student, start, target);
  check_backward("trajectory_distance_backward", grad, sums, {2}, student[0]);
}

inline std::tuple<at::Tensor, at::Tensor> distance_results(at::TensorList student) {
  return {at::empty({}, student[0].options()), at::empty({2}, student[0].options().dtype(at::kDouble))};
}

// Memory for the gradients that are wanted.
inline std::vector<at::Tensor> distance_gradients(at::TensorList student, std::initializer_list<bool> wanted) {
  std::vector<at::Tensor> gradients;
  for (const bool w : wanted) {
    for (size_t i = 0; w && i < student.size(); ++i) {
      gradients.push_back(at::empty_like(student[i]));
    }
  }
  return gradients;
}

// The three lists, all in the memory order of their gradients, and the gradients that are wanted.
struct DistanceTensors {
  std::vector<at::Tensor> inputs;     // what the pieces point into
  std::vector<at::Tensor> gradients;  // student's, then start's, then target's: the operator's result
  std::vector<int64_t> sizes;
  bool wanted[3];

  DistanceTensors(at::TensorList student, at::TensorList start, at::TensorList target, bool student_wanted,
                  bool start_wanted, bool target_wanted)
      : wanted{student_wanted, start_wanted, target_wanted} {
    const at::TensorList lists[] = {student, start, target};
    for (const at::Tensor& tensor : student) {
      sizes.push_back(tensor.numel());
    }
    for (int list = 0; list < 3; ++list) {
      for (size_t i = 0; i < student.size(); ++i) {
        inputs.push_back(in_order_of(student[i], lists[list][i]));
      }
    }
    gradients = distance_gradients(student, {student_wanted, start_wanted, target_wanted});
  }

  template <typename T>
  std::vector<DistancePiece<T>> pieces() const {
    const size_t count = sizes.size();
    std::vector<DistancePiece<T>> result(count);
    size_t taken = 0;
    T* DistancePiece<T>::* const places[] = {&DistancePiece<T>::student_grad, &DistancePiece<T>::start_grad,
                                             &DistancePiece<T>::target_grad};
    for (size_t i = 0; i < count; ++i) {
      result[i].student = inputs[i].const_data_ptr<T>();
      result[i].start = inputs[count + i].const_data_ptr<T>();
      result[i].target = inputs[2 * count + i].const_data_ptr<T>();
      result[i].size = sizes[i];
    }
    for (int list = 0; list < 3; ++list) {
      for (size_t i = 0; i < count; ++i) {
        result[i].*places[list] = wanted[list] ? gradients[taken++].mutable_data_ptr<T>() : nullptr;
      }
    }
    return result;
  }

 private:
  // The tensor itself where its memory is dense and ordered as empty_like(model)'s, else a copy that is.
  static at::Tensor in_order_of(const at::Tensor& model, const at::Tensor& tensor) {
    if (model.is_contiguous()) {
      return tensor.contiguous();
    }
    if (model.is_non_overlapping_and_dense() && tensor.strides() == model.strides()) {
      return tensor;
    }
    return at::empty_like(model).copy_(tensor);
  }
};

}  // namespace selmatch
