// The checks that all operators share. They take symbolic sizes, so that the implementations for fake tensors,
// registered for Meta beside those for the CPU, call the same functions as those that compute.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/AutogradState.h>

#include <initializer_list>
#include <limits>

namespace selmatch {

// Plain memory, on the device of `model`, and no tangent of forward-mode differentiation that would be lost.
inline void check_tensor(const char* op, const char* name, const at::Tensor& tensor, const char* model_name,
                         const at::Tensor& model) {
  TORCH_CHECK_VALUE(tensor.device() == model.device(), op, ": ", name, " is on ", tensor.device(), ", ", model_name,
                    " on ", model.device(), "; they must be on one device");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, op, ": ", name, " must be a strided tensor, got ", tensor.layout());
  if (c10::AutogradState::get_tls_state().get_fw_grad_mode()) {
    TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(0).defined(), op, ": ", name,
                                " has a tangent, and this operator has no forward-mode derivative");
  }
}

inline void check_floating(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble, op, ": ", name,
                   " must be float32 or float64, got ", tensor.scalar_type());
}

inline const char* dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kByte:
      return "uint8";
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kBFloat16:
      return "bfloat16";
    default:
      return c10::toString(dtype);
  }
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", name, " must be ", dtype_name(dtype), ", got ",
                   dtype_name(tensor.scalar_type()));
}

inline void check_sizes(const char* op, const char* name, const at::Tensor& tensor, c10::SymIntArrayRef sizes) {
  TORCH_CHECK_VALUE(tensor.sym_sizes() == sizes, op, ": ", name, " must have shape ", sizes, ", got ",
                    tensor.sym_sizes());
}

// (batch, channels, height, width), where the loops count through an image with 32-bit numbers.
inline void check_images(const char* op, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.dim() == 4, op, ": ", name, " must have shape (batch, channels, height, width), got ",
                    tensor.sym_sizes());
  c10::SymInt elements = 1;
  for (int d = 1; d < 4; ++d) {
    const c10::SymInt size = tensor.sym_size(d);
    TORCH_CHECK_VALUE(size <= std::numeric_limits<int32_t>::max(), op, ": ", name, " must have sides below 2^31, got ",
                      tensor.sym_sizes());
    elements = elements * size;  // of at most 2^30 and at most 2^31
    TORCH_CHECK_VALUE(elements <= (int64_t{1} << 30), op, ": ", name, " must have at most 2^30 elements an image, got ",
                      tensor.sym_sizes());
  }
}

struct NamedList {
  const char* name;
  at::TensorList tensors;
};

// float32 or float64, of one dtype and on one device; as many in each list as in the first, and of the same shapes.
inline void check_lists(const char* op, std::initializer_list<NamedList> lists) {
  const auto& [model_name, model] = *lists.begin();
  TORCH_CHECK_VALUE(!model.empty(), op, ": ", model_name, " has no tensors");
  check_floating(op, model_name, model[0]);
  const at::ScalarType dtype = model[0].scalar_type();
  for (const auto& [name, tensors] : lists) {
    TORCH_CHECK_VALUE(tensors.size() == model.size(), op, ": ", model_name, " has ", model.size(), " tensors, ", name,
                      " ", tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const at::Tensor& tensor = tensors[i];
      TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", name, "[", i, "] is ", tensor.scalar_type(), ", ",
                       model_name, "[0] is ", dtype);
      check_tensor(op, name, tensor, model_name, model[0]);
      TORCH_CHECK_VALUE(tensor.sym_sizes() == model[i].sym_sizes(), op, ": ", name, "[", i, "] has shape ",
                        tensor.sym_sizes(), ", ", model_name, "[", i, "] ", model[i].sym_sizes());
    }
  }
}

// What a distance's backward pass is given beside its inputs: the gradient of the value, and the forward pass's sums.
inline void check_backward(const char* op, const at::Tensor& grad, const at::Tensor& sums, c10::SymIntArrayRef sizes,
                           const at::Tensor& model) {
  check_tensor(op, "grad", grad, "the first tensor", model);
  check_tensor(op, "sums", sums, "the first tensor", model);
  check_dtype(op, "grad", grad, model.scalar_type());
  check_dtype(op, "sums", sums, at::kDouble);
  check_sizes(op, "grad", grad, {});
  check_sizes(op, "sums", sums, sizes);
}

}  // namespace selmatch
