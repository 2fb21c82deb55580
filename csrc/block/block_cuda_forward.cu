// The forward passes of a block on the GPU (see block_cuda.h).
#include "block/block_cuda.h"

namespace selmatch {
namespace {

template <typename V>
SELMATCH_KERNEL SELMATCH_LAUNCH_BOUNDS(V::threads(false), V::resident(false))
    forward_kernel(BlockCall call, BlockPlan plan) {
  BlockWork<V, false>(call, plan).forward();
}

template <typename T>
SELMATCH_KERNEL SELMATCH_LAUNCH_BOUNDS(kMergeThreads, 1) stats_kernel(BlockCall call) {
  SELMATCH_SHARED(parts, BlockMoments[kMergeThreads]);
  const MergeTask task(call, call.norm == kBlockBatchNorm);
  const auto read = [&](int64_t n, int c) -> BlockMoments {
    const BlockSums of = read_sums<T>(call, n, c);
    return {static_cast<double>(call.height) * call.width, of.sum[0], of.sum[1], of.sum[2], of.sum[3]};
  };
  const auto write = [&](int c, const BlockMoments& all) {
    T values[kBlockStats];
    moments_to_stats(all, call.eps, values);
    for (int k = 0; k < call.stats_count; ++k) {
      static_cast<T*>(call.stats)[(task.row * call.stats_count + k) * call.channels + c] = values[k];
    }
  };
  task.run(call.channels, parts, read, write);
}

template <typename V>
void forward(const BlockCall& call, void* stream) {
  const BlockPlan plan = BlockPlanner<V, false>(call).make();
  if (call.norm != kBlockNoNorm && !plan.apply) {
    sweep<V>(&forward_kernel<V>, call, plan, true, false, stream);
    const int64_t blocks = merge_blocks(call, call.norm == kBlockBatchNorm);
    launch(&stats_kernel<typename V::T>, blocks, kMergeThreads, 0, stream, call);
  }
  sweep<V>(&forward_kernel<V>, call, plan, plan.apply, true, stream);
}

}  // namespace

void block_cuda_forward(const BlockCall& call, bool dual, void* stream) {
  const auto run = [&]<typename V>(V) { forward<V>(call, stream); };
  return dual ? run_variant<true>(call, run) : run_variant<false>(call, run);
}

}  // namespace selmatch
