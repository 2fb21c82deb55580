// The block operators on the CPU: images are shared out among the threads, and sums over the batch are taken in order,
// so the result does not depend on how many threads there are.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "block/block_torch.h"

namespace selmatch {
namespace {

void parallel(void* context, int64_t count, BlockBody body) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

void run(const BlockCall& call, int pass, at::Device) { block_cpu(call, pass, &parallel); }

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, CPU, m) { block_register<&run>(m); }

}  // namespace selmatch
