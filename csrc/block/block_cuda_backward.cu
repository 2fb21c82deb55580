// The backward passes of a block on the GPU (see block_cuda.h).
#include "block/block_cuda.h"

namespace selmatch {
namespace {

template <typename V>
SELMATCH_KERNEL SELMATCH_LAUNCH_BOUNDS(V::threads(true), V::resident(true))
    backward_kernel(BlockCall call, BlockPlan plan) {
  BlockWork<V, true>(call, plan).backward();
}

// The means of the backward pass where groups go beyond a slab, and, over the batch, the gradients of gamma and beta.
template <typename T>
SELMATCH_KERNEL SELMATCH_LAUNCH_BOUNDS(kMergeThreads, 1) sums_kernel(BlockCall call, bool over_batch) {
  SELMATCH_SHARED(parts, BlockSums[kMergeThreads]);
  const MergeTask task(call, over_batch);
  const bool dual = call.stats_count == kBlockStats;
  const auto read = [&](int64_t n, int c) -> BlockSums {
    const BlockSums of = read_sums<T>(call, n, c);
    return over_batch ? of : weighted<T>(call, c, of);
  };
  const auto write = [&](int c, const BlockSums& all) {
    if (over_batch && !call.per_pixel) {
      static_cast<T*>(call.beta_grad)[c] = static_cast<T>(all.sum[dual ? 2 : 0]);
      static_cast<T*>(call.gamma_grad)[c] = static_cast<T>(all.sum[dual ? 3 : 1]);
    }
    if (!over_batch || call.norm == kBlockBatchNorm) {
      const double count = static_cast<double>(call.height) * call.width * static_cast<double>(task.items);
      const BlockSums q = over_batch ? weighted<T>(call, c, all) : all;
      for (int k = 0; k < kBlockMeans; ++k) {
        static_cast<T*>(call.means)[(task.row * kBlockMeans + k) * call.channels + c] =
            static_cast<T>(q.sum[k] / count);
      }
    }
  };
  task.run(call.channels, parts, read, write);
}

// The gradients of gamma and beta where each pixel has its own: a block takes one cell of 32 channels, each warp of it
// every so many-th image; V::kWidth is 1.
template <typename V>
SELMATCH_KERNEL SELMATCH_LAUNCH_BOUNDS(kBlockThreads, 2) pixel_gradients_kernel(BlockCall call, int cell_columns) {
  using T = typename V::T;
  constexpr int kSums = 2 * V::kPixels;
  SELMATCH_SHARED(table, T[kSums][kBlockThreads]);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32), chunks = (call.channels + 31) / 32;
  BlockSlab<V> slab(call);
  slab.channel = static_cast<int>(blockIdx.x % chunks) * 32 + lane;
  const auto at = slab.place(static_cast<int>(blockIdx.x / chunks), cell_columns);
  T sum[kSums] = {};
  if (slab.channel < call.channels) {
    for (int64_t n = warp; n < call.batch; n += warps) {
      slab.set_image(n);
      const auto cell = slab.template read<true>(at);
      const T* stats =
          static_cast<const T*>(call.stats) + stats_row(call, n) * V::kCount * call.channels + slab.channel;
      BlockChannel<T> channel = {stats[0], stats[call.channels]};
      if constexpr (V::kDual) {
        channel.mean_t = stats[2 * call.channels];
        channel.product = stats[3 * call.channels];
      }
      BlockParameters<T> p[V::kPixels] = {};
      BlockPoint<T> point[V::kPixels];
      typename BlockSlab<V>::Slopes slopes[V::kPixels];
      slab.points(cell, at, 0, channel, p, point);
      slab.slopes(cell, 0, point, slopes);
#pragma unroll
      for (int k = 0; k < V::kPixels; ++k) {
        if constexpr (V::kDual) {
          sum[2 * k] += slopes[k].at;
          sum[2 * k + 1] += slopes[k].at * point[k].zh + slopes[k].a * point[k].zht;
        } else {
          sum[2 * k] += slopes[k].a;
          sum[2 * k + 1] += slopes[k].a * point[k].zh;
        }
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    table[k][threadIdx.x] = sum[k];
  }
  __syncthreads();
  for (int k = warp; k < kSums; k += warps) {
    T total = 0;
    for (int w = 0; w < warps; ++w) {
      total += table[k][32 * w + lane];
    }
    if (slab.has_pixel(at, k / 2) && slab.channel < call.channels) {
      T* grad = static_cast<T*>(k % 2 == 0 ? call.beta_grad : call.gamma_grad);
      grad[slab.pixel(at, k / 2) + slab.channel] = total;
    }
  }
}

template <typename V>
void backward(const BlockCall& call, void* stream) {
  using T = typename V::T;
  const BlockPlan plan = BlockPlanner<V, true>(call).make();
  if (call.norm == kBlockNoNorm) {
    return sweep<V>(&backward_kernel<V>, call, plan, false, true, stream);
  }
  const bool batch_norm = call.norm == kBlockBatchNorm;
  sweep<V>(&backward_kernel<V>, call, plan, true, plan.apply, stream);
  if (batch_norm || !call.per_pixel) {
    launch(&sums_kernel<T>, merge_blocks(call, true), kMergeThreads, 0, stream, call, true);
  }
  if (!plan.apply) {
    if (!batch_norm) {
      launch(&sums_kernel<T>, merge_blocks(call, false), kMergeThreads, 0, stream, call, false);
    }
    sweep<V>(&backward_kernel<V>, call, plan, false, true, stream);
  }
  if constexpr (V::kPerPixel) {
    if (call.per_pixel) {
      const int64_t blocks = static_cast<int64_t>(plan.cells) * ((call.channels + 31) / 32);
      launch(&pixel_gradients_kernel<V>, blocks, kBlockThreads, 0, stream, call, plan.cell_columns);
    }
  }
}

}  // namespace

void block_cuda_backward(const BlockCall& call, bool dual, void* stream) {
  const auto run = [&]<typename V>(V) { backward<V>(call, stream); };
  return dual ? run_variant<true>(call, run) : run_variant<false>(call, run);
}

}  // namespace selmatch
