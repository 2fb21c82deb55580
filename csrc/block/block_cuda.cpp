// The block operators on the GPU: torch's side.
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "block/block_torch.h"

namespace selmatch {
namespace {

void run(const BlockCall& call, int pass, at::Device device) {
  const c10::cuda::CUDAGuard guard(device);
  const bool forward = pass == kBlockForward || pass == kBlockDualForward;
  const auto start = forward ? &block_cuda_forward : &block_cuda_backward;
  start(call, block_is_dual(pass), c10::cuda::getCurrentCUDAStream().stream());
}

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, CUDA, m) { block_register<&run>(m); }

}  // namespace selmatch
