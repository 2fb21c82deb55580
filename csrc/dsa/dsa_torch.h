// What the CPU and the CUDA entry of selmatch_ext::dsa share: checks, and the call described with plain pointers.
#pragma once

#include <ATen/ATen.h>

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
  TORCH_CHECK_VALUE(x.dim() == 4, "dsa: x must have 4 dimensions (batch, channels, height, width), got shape ",
                    x.sizes());
  TORCH_CHECK_VALUE(x.numel() == 0 || x.numel() / x.size(0) <= (int64_t{1} << 30),
                    "dsa: images of more than 2^30 elements");
  TORCH_CHECK_VALUE(mode >= 0 && mode < kDsaModes, "dsa: mode must be 0, 1 or 2, got ", mode);
  TORCH_CHECK_TYPE(ops.scalar_type() == at::kByte, "dsa: ops must be uint8, got ", ops.scalar_type());
  TORCH_CHECK_TYPE(params.scalar_type() == at::kFloat || params.scalar_type() == at::kDouble,
                   "dsa: params must be float32 or float64, got ", params.scalar_type());
  TORCH_CHECK_VALUE(ops.device() == x.device() && params.device() == x.device(), "dsa: x is on ", x.device(),
                    ", ops on ", ops.device(), ", params on ", params.device(), "; they must be on one device");
  TORCH_CHECK_VALUE(ops.dim() == 2 && (ops.size(0) == 1 || ops.size(0) == x.size(0)), "dsa: ops must have shape (",
                    x.size(0), " or 1, length), got ", ops.sizes());
  TORCH_CHECK_VALUE(
      params.dim() == 3 && params.size(0) == ops.size(0) && params.size(1) == ops.size(1) && params.size(2) == 4,
      "dsa: params must have shape (", ops.size(0), ", ", ops.size(1), ", 4) as ops has, got ", params.sizes());
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
