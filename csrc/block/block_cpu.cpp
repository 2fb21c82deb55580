// The block operators on the CPU: images are shared out among the threads, and sums over the batch are taken in order,
// so the result does not depend on how many threads there are.
#include <torch/library.h>

#include "block/block_torch.h"
#include "cpu_torch.h"

namespace selmatch {
namespace {

void run(const BlockCall& call, int pass, at::Device) { block_cpu(call, pass, &torch_parallel); }

}  // namespace

TORCH_LIBRARY_IMPL(selmatch_ext, CPU, m) { block_register<&run>(m); }

}  // namespace selmatch
