// What the CPU and the CUDA entry of selmatch_ext::dsa share: checks, and the call described with plain pointers.
#pragma once

#include <ATen/ATen.h>

#include "checks_torch.h"
#include "dsa/dsa.h"

namespace selmatch {

inline DsaType dsa_type(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DsaType::kFloat;
    case at::kDouble:
      return DsaType::kDouble;
    case at::kHalf:
      return DsaType::kHalf;
    case at::kBFloat16:
      return DsaType::kBfloat16;
    default:
      TORCH_CHECK_TYPE(false, "dsa: x must be float32, float64, float16 or bfloat16, got ", x.scalar_type());
  }
}

// x: (batch, channels, height, width), any strides; ops: (rows, length) uint8; params: (rows, length, 4) float32 or
// float64.
inline void dsa_check(const at::Tensor& x, const at::Tensor& ops, const at::Tensor& params, int64_t mode) {
  dsa_type(x);
  check_tensor("dsa", "x", x, "x", x);
  check_tensor("dsa", "ops", ops, "x", x);
  check_tensor("dsa", "params", params, "x", x);
  check_images("dsa", "x", x);
  TORCH_CHECK_VALUE(mode >= 0 && mode < kDsaModes, "dsa: mode must be 0, 1 or 2, got ", mode);
  check_dtype("dsa", "ops", ops, at::kByte);
  check_floating("dsa", "params", params);
  TORCH_CHECK_VALUE(ops.dim() == 2 && (ops.sym_size(0) == 1 || ops.sym_size(0) == x.sym_size(0)),
                    "dsa: ops must have shape (", x.sym_size(0), " or 1, length), got ", ops.sym_sizes());
  check_sizes("dsa", "params", params, {ops.sym_size(0), ops.sym_size(1), 4});
}

// ops and params must be contiguous, and outlive the call.
inline DsaCall dsa_call(const at::Tensor& x, const at::Tensor& y, const at::Tensor& ops, const at::Tensor& params,
                        int64_t mode) {
  DsaCall call = {};
  call.type = dsa_type(x);
  call.mode = static_cast<int>(mode);
  call.batch = x.size(0);
  call.channels = static_cast<int>(x.size(1));
  call.height = static_cast<int>(x.size(2));
  call.width = static_cast<int>(x.size(3));
  call.x = x.const_data_ptr();
  call.y = y.mutable_data_ptr();
  for (int d = 0; d < 4; ++d) {
    call.x_strides[d] = x.stride(d);
    call.y_strides[d] = y.stride(d);
  }
  call.ops = ops.const_data_ptr<uint8_t>();
  call.params = params.const_data_ptr();
  call.wide_params = params.scalar_type() == at::kDouble;
  call.rows = ops.size(0);
  call.length = ops.size(1);
  return call;
}

}  // namespace selmatch
