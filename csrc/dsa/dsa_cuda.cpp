// selmatch_ext::dsa on the GPU: torch's side of dsa_cuda.cu.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "dsa/dsa_torch.h"

namespace selmatch {
namespace {

// x: (batch, channels, height, width); ops: (rows, length); params: (rows, length, 4). Codes that are no operation do
// nothing here: looking at them would mean to wait for the GPU.
at::Tensor dsa_on_cuda(const at::Tensor& x, const at::Tensor& ops, const at::Tensor& params, int64_t mode) {
  dsa_check(x, ops, params, mode);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor codes = ops.contiguous(), values = params.contiguous();
  at::Tensor y = at::empty_like(x);
  if (x.numel() == 0) {
    return y;
  }
  const DsaCall call = dsa_call(x, y, codes, values, mode);
  const size_t bytes = dsa_cuda_workspace(call);
  at::Tensor workspace;
  if (bytes > 0) {
    workspace = at::empty({static_cast<int64_t>(bytes)},
                          x.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
  }
  dsa_cuda(call, bytes > 0 ? workspace.mutable_data_ptr() : nullptr, c10::cuda::getCurrentCUDAStream().stream());
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, CUDA, m) { m.impl("dsa", &dsa_on_cuda); }

}  // namespace selmatch
