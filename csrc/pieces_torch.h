// The checks that operators on lists of tensors share.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>

namespace selmatch {

struct NamedList {
  const char* name;
  at::TensorList tensors;
};

// float32 or float64, of one dtype and on one device; as many in each list as in the first, and of the same shapes.
inline void check_lists(const char* op, std::initializer_list<NamedList> lists) {
  const auto& [model_name, model] = *lists.begin();
  TORCH_CHECK_VALUE(!model.empty(), op, ": ", model_name, " has no tensors");
  const at::ScalarType dtype = model[0].scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble, op, ": ", model_name,
                   " must be float32 or float64, got ", dtype);
  for (const auto& [name, tensors] : lists) {
    TORCH_CHECK_VALUE(tensors.size() == model.size(), op, ": ", model_name, " has ", model.size(), " tensors, ", name,
                      " ", tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const at::Tensor& tensor = tensors[i];
      TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", name, "[", i, "] is ", tensor.scalar_type(), ", ",
                       model_name, "[0] is ", dtype);
      TORCH_CHECK_VALUE(tensor.device() == model[0].device(), op, ": ", name, "[", i, "] is on ", tensor.device(), ", ",
                        model_name, "[0] on ", model[0].device());
      TORCH_CHECK_VALUE(tensor.sizes() == model[i].sizes(), op, ": ", name, "[", i, "] has shape ", tensor.sizes(),
                        ", ", model_name, "[", i, "] ", model[i].sizes());
    }
  }
}

}  // namespace selmatch
