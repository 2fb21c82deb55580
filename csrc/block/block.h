// A block of a convolutional network, norm + activation + pooling, in one pass: what its CPU loops and its CUDA kernels
// share. Forward, backward, and both again carrying tangents ("dual": the derivative along one direction of everything
// that goes in). DESIGN: with z the output of a convolution, m(.) the mean over what the norm averages over,
//   r = 1 / sqrt(m((z - m(z))^2) + eps),  zh = (z - m(z)) r,  n = gamma zh + beta,  y = pool(act(n))
// forward    y
// backward   a = act'(n) unpool(g),  q = gamma a:  g_gamma = sum a zh,  g_beta = sum a,
//            g_z = r (q - m(q) - zh m(q zh))
// and their tangents, marked t, with s = m(zh zt):
//   zht = r (zt - m(zt) - zh s),  nt = gamma_t zh + gamma zht + beta_t,  yt = pool(act'(n) nt)
//   at = act'(n) unpool(gt) + act''(n) nt unpool(g),  qt = gamma_t a + gamma at
//   g_gamma_t = sum (at zh + a zht),  g_beta_t = sum at
//   g_z_t = r (qt - m(qt) - zht m(q zh) - zh m(qt zh + q zht)) - r s g_z
// Everything is recomputed from z and a few statistics; no mask and no normalized copy is stored. No ATen here.
#pragma once

#include "cpu_work.h"
#include "platform.h"

namespace selmatch {

enum BlockNorm : int { kBlockNoNorm, kBlockSampleNorm, kBlockBatchNorm, kBlockNorms };
enum BlockActivation : int { kBlockPiecewise, kBlockSigmoid, kBlockSwish, kBlockActivations };
enum BlockPool : int { kBlockNoPool, kBlockAveragePool, kBlockMaxPool, kBlockPools };
enum BlockPass : int { kBlockForward, kBlockBackward, kBlockDualForward, kBlockDualBackward };
enum class BlockType : int { kFloat, kDouble, kBfloat16 };

// Statistics of a channel, in `stats`: those of the forward pass are the first two.
enum BlockStat : int { kBlockMean, kBlockScale, kBlockTangentMean, kBlockTangentProduct, kBlockStats };
// Means of the backward pass, m(q), m(q zh), m(qt), m(qt zh + q zht).
enum BlockMean : int { kBlockQ, kBlockQz, kBlockQt, kBlockQzt, kBlockMeans };

// One call. Images are stored pixel by pixel, the channels of a pixel side by side (torch's channels-last); S is their
// type, T = double for double, else float. What a pass does not use is null.
struct BlockCall {
  BlockType type;
  int norm;    // BlockNorm; sample: over height, width and channels / groups channels of one image
  int groups;  // of the sample norm
  double eps;
  int activation;  // BlockActivation; piecewise: n > 0 ? n : slope n (relu 0, identity 1)
  double slope;
  int pool;        // BlockPool, 2 x 2 pixels with stride 2; an odd last row or column has no output
  bool per_pixel;  // gamma and beta have a value for each pixel and channel (layer norm), not for each channel
  int64_t batch;
  int channels, height, width;

  const void* z;                                // S (batch, height, width, channels)
  const void *zt, *zt_more;                     // S like z: the tangent of z is their sum; zt_more may be null
  const void *gamma, *beta, *gamma_t, *beta_t;  // T (channels) or, per_pixel, (height, width, channels)
  const void* g;                                // S (batch, height / 2, width / 2, channels), or unpooled like z
  const void *gt, *gt_more;                     // S like g: its tangent is their sum; gt_more may be null

  void *y, *yt;                  // S like g
  void *gz, *gzt;                // S like z
  void* stats;                   // T (rows, stats_count, channels), in the order of BlockStat; written by forward
  int stats_count;               // 2, or 4 in the dual passes
  void* sums;                    // T (batch, 4, channels), workspace
  void* means;                   // T (rows, 4, channels), workspace of backward, in the order of BlockMean
  void *gamma_grad, *beta_grad;  // T like gamma; in the dual backward pass their tangents
};

// Rows of stats and means: one per image, or one for the whole batch.
inline int64_t block_rows(const BlockCall& call) { return call.norm == kBlockSampleNorm ? call.batch : 1; }
inline bool block_is_dual(int pass) { return pass == kBlockDualForward || pass == kBlockDualBackward; }

// Count, mean and centered sums of one channel of one image or of several together.
struct BlockMoments {
  double count, mean, squares, mean_t, products;

  // Chan's formula: nothing large is subtracted from anything large.
  SELMATCH_HD void merge(const BlockMoments& other) {
    const double total = count + other.count, share = other.count / total;
    const double step = other.mean - mean, step_t = other.mean_t - mean_t, weight = count * share;
    squares += other.squares + step * step * weight;
    products += other.products + step * step_t * weight;
    mean += step * share;
    mean_t += step_t * share;
    count = total;
  }
};

// One pass on the CPU (block_cpu_loops.cpp).
void block_cpu(const BlockCall& call, int pass, CpuParallel parallel);
template <typename S, typename T>
void block_cpu_type(const BlockCall& call, int pass, CpuParallel parallel);  // block_cpu_type.h

// One pass on the GPU; pointers are the device's (block_cuda_forward.cu, block_cuda_backward.cu).
void block_cuda_forward(const BlockCall& call, bool dual, void* stream);
void block_cuda_backward(const BlockCall& call, bool dual, void* stream);

}  // namespace selmatch
