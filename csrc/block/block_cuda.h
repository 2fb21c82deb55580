// Norm + activation + pooling on the GPU: what block_cuda_forward.cu and block_cuda_backward.cu share. One thread block
// owns a slab: some channels of one image.
//
// Layout. Channels lie side by side in memory, so the threads of a block stand `lanes` side by side along the channels,
// each with a pack of them (4 float32; 8 bfloat16, 4 in the dual passes for want of registers), and in rows, each row
// at a cell of its own: the 2 x 2 pixels that are pooled into one, or some pixels in a row without pooling. A slab is
// 64 or 128 bytes of a pixel wide: whole memory sectors, and narrow enough that most or all of what a block reads in
// its first sweep (for the sums) still lies in shared memory in its second one (for the results), with two or three
// blocks to a multiprocessor, so that some load while others add up. Each thread keeps what it read itself and needs no
// barrier for that; cells beyond the shared memory are read again, the last first, mostly from the second cache. A
// thread has a whole cell's loads under way at once: 4 packs in the forward pass, up to 15 in the dual backward pass.
// For example 32 x 32 pixels, 128 channels, float32, on an H100: forward 8 slabs of 64 KB an image, all kept, 3 blocks
// to a multiprocessor, so 48 KB under way on each (its share of 3.35 TB/s takes 18 KB at 700 ns) and 50 images are one
// wave. Dual forward keeps 3 of 4 cells of a thread, dual backward 2 of 4. None of this was measured yet:
// bench/block.py does, and the figures to turn are the slab's widths in BlockPlanner and BlockVariant's threads, pixels
// and residents.
//
// Where the norm's mean goes beyond a slab (batch norm, wide groups), the two sweeps are two launches with a small
// kernel between them. Everything is added up in a fixed order, without atomics: the same input gives the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <iterator>
#include <type_traits>

#include "block/block.h"

namespace selmatch {
namespace {

SELMATCH_HD float exp_of(float x) { return std::exp(x); }
SELMATCH_HD double exp_of(double x) { return std::exp(x); }

#include "block/block_math.h"

constexpr int kMaxLanes = 32;
constexpr int kMergeThreads = 2 * kBlockThreads;
constexpr int kMergeColumns = 4;  // channels that a block of the merging kernels takes: half a sector, more blocks

// How one launch shares out the work.
struct BlockPlan {
  int lane_bits;     // log2 of the lanes
  int slab, slabs;   // channels of a slab, slabs of an image
  int cell_columns;  // cells side by side, with pooling
  int cells;         // of an image
  int kept, slots;   // cells of a thread that stay in shared memory, packs of each
  bool sums, apply;  // which of the two sweeps are made; both: norm groups do not go beyond a slab
  int threads;
};

// Whether 2 x 2 pixels are pooled: never, always, or as the call says.
enum class Pooling { kNever, kAlways, kAny };

// One kernel for all activations, where there are to be few kernels.
template <typename T>
struct AnyActivation {
  PiecewiseActivation<T> piecewise;
  SmoothActivation<T> smooth;
  bool is_piecewise;

  explicit SELMATCH_HD AnyActivation(const BlockCall& call)
      : piecewise(call), smooth(call), is_piecewise(call.activation == kBlockPiecewise) {}

  SELMATCH_HD BlockCurve<T> operator()(T n) const {
    if (is_piecewise) {
      return piecewise(n);
    }
    return smooth(n);
  }
};

// S: what is stored, T: what is computed with; kWidth: channels of a thread.
template <typename S_, typename T_, int kWidth_, typename Activation_, bool kDual_, Pooling kPooling>
struct BlockVariant {
  using S = S_;
  using T = T_;
  using Activation = Activation_;
  static constexpr int kWidth = kWidth_;
  static constexpr bool kDual = kDual_;
  // Of a cell; few enough for registers.
  static constexpr int kPixels = kPooling == Pooling::kNever && (kDual || kWidth == 8) ? 2 : 4;
  static constexpr int kOuts = kPooling == Pooling::kAlways ? 1 : kPixels;
  static constexpr int kCount = kDual ? 4 : 2;  // sums, and statistics
  static constexpr bool kFolds = std::is_same_v<S, T>;

  static SELMATCH_HD bool pooled(const BlockCall& call) {
    return kPooling == Pooling::kAny ? call.pool != kBlockNoPool : kPooling == Pooling::kAlways;
  }
  static SELMATCH_HD int outs(const BlockCall& call) { return pooled(call) ? 1 : kOuts; }

  // Parameters of each pixel's own (layer norm) only one channel at a time, which leaves the others their registers.
  static constexpr bool kPerPixel = kWidth == 1;
  // Threads of a block, and blocks to a multiprocessor: as many as have registers for a cell without spilling.
  static constexpr int threads(bool backward) {
    return kDual && kPooling == Pooling::kAlways && backward && sizeof(S) == 2 ? (kBlockThreads * 3 / 4 + 31) / 32 * 32
                                                                               : kBlockThreads;
  }
  static constexpr int resident(bool backward) { return kDual || backward || kWidth == 8 ? 2 : 3; }
};

template <typename S, int kWidth>
struct alignas(sizeof(S) * kWidth) BlockPack {
  S item[kWidth];
};

// A pack of a tensor that may be the sum of two; where S can hold the sum, `value` is it.
template <typename V>
struct BlockPair {
  BlockPack<typename V::S, V::kWidth> value, more;

  SELMATCH_DEVICE typename V::T at(int j) const {
    if constexpr (V::kFolds) {
      return value.item[j];
    } else {
      return widen(value.item[j]) + widen(more.item[j]);
    }
  }
};

struct BlockSums {  // of a, a zh, at and at zh + a zht, or of their q's
  double sum[4];

  SELMATCH_DEVICE void merge(const BlockSums& other) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sum[k] += other.sum[k];
    }
  }
};

SELMATCH_DEVICE void merge_part(BlockMoments* part, const BlockMoments& other) {
  if (other.count > 0) {
    part->merge(other);
  }
}
SELMATCH_DEVICE void merge_part(BlockSums* part, const BlockSums& other) { part->merge(other); }

// From sums of a, a zh, ... of channel c to those of q, q zh, ...; per_pixel they are that already.
template <typename T>
SELMATCH_DEVICE BlockSums weighted(const BlockCall& call, int c, const BlockSums& of) {
  if (call.per_pixel) {
    return of;
  }
  const double gamma = static_cast<const T*>(call.gamma)[c];
  const double gamma_t = call.gamma_t == nullptr ? 0 : static_cast<const T*>(call.gamma_t)[c];
  return {{gamma * of.sum[0], gamma * of.sum[1], gamma * of.sum[2] + gamma_t * of.sum[0],
           gamma * of.sum[3] + gamma_t * of.sum[1]}};
}

template <typename T>
SELMATCH_DEVICE void moments_to_stats(const BlockMoments& all, double eps, T stats[4]) {
  const T scale = T(1) / std::sqrt(static_cast<T>(all.squares / all.count + eps));
  stats[kBlockMean] = static_cast<T>(all.mean);
  stats[kBlockScale] = scale;
  stats[kBlockTangentMean] = static_cast<T>(all.mean_t);
  stats[kBlockTangentProduct] = scale * static_cast<T>(all.products / all.count);
}

SELMATCH_DEVICE int64_t stats_row(const BlockCall& call, int64_t image) {
  return call.norm == kBlockSampleNorm ? image : 0;
}

// --- a thread's view of its slab -------------------------------------------------------------------------------------

// Numbers of a channel in shared memory: BlockStat, then these, then BlockMean.
constexpr int kGamma = kBlockStats, kBeta = kGamma + 1, kGammaT = kGamma + 2, kBetaT = kGamma + 3;
constexpr int kMeans = kGamma + 4, kConstants = kMeans + kBlockMeans;

template <typename V>
struct BlockSlab {
  using S = typename V::S;
  using T = typename V::T;
  using Pack = BlockPack<S, V::kWidth>;
  using Pair = BlockPair<V>;
  static constexpr int kPixels = V::kPixels, kOuts = V::kOuts, kWidth = V::kWidth;

  struct Place {  // where a cell's first pixel and its output begin in an image
    int first, out;
    int present;  // bit k: there is a pixel k; pooled, bit kPixels: there is an output
  };
  struct Cell {
    Pack z[kPixels], g[kOuts];
    Pair zt[kPixels], gt[kOuts];
  };
  struct Slopes {
    T a, at;
  };

  const BlockCall& call;
  const typename V::Activation activation;
  int channel;               // this thread's first one
  int64_t begin, out_begin;  // this thread's first element of the image, of the pooled image

  SELMATCH_DEVICE explicit BlockSlab(const BlockCall& call_) : call(call_), activation(call_) {}

  SELMATCH_DEVICE int pixels() const { return call.height * call.width; }
  SELMATCH_DEVICE bool pooled() const { return V::pooled(call); }

  SELMATCH_DEVICE void set_image(int64_t image) {
    begin = image * pixels() * call.channels + channel;
    out_begin = pooled() ? image * (call.height / 2) * (call.width / 2) * call.channels + channel : begin;
  }

  SELMATCH_DEVICE Place place(int cell, int cell_columns) const {
    if (pooled()) {
      const int i = cell / cell_columns, j = cell - i * cell_columns;
      const bool right = 2 * j + 1 < call.width, below = 2 * i + 1 < call.height;
      return {(2 * i * call.width + 2 * j) * call.channels, (i * (call.width / 2) + j) * call.channels,
              1 | (right ? 2 : 0) | (below ? 4 : 0) | (right && below ? 8 | 1 << kPixels : 0)};
    }
    const int first = cell * kPixels, rest = pixels() - first;
    return {first * call.channels, 0, rest < kPixels ? (1 << rest) - 1 : (1 << kPixels) - 1};
  }
  SELMATCH_DEVICE bool has_pixel(const Place& at, int k) const { return at.present >> k & 1; }
  SELMATCH_DEVICE int pixel(const Place& at, int k) const {
    return at.first + (pooled() ? k / 2 * call.width + k % 2 : k) * call.channels;
  }
  // Output k of a cell; pooled there is one.
  SELMATCH_DEVICE bool has_out(const Place& at, int k) const {
    return k < V::outs(call) && has_pixel(at, pooled() ? kPixels : k);
  }
  SELMATCH_DEVICE int out(const Place& at, int k) const { return pooled() ? at.out : pixel(at, k); }

  // --- reading a cell, from global memory or from what this thread kept of it

  SELMATCH_DEVICE Pack load_pixel(const void* tensor, const Place& at, int k) const {
    return has_pixel(at, k) ? pack_at(tensor, begin + pixel(at, k)) : Pack{};
  }
  SELMATCH_DEVICE Pack load_out(const void* tensor, const Place& at, int k) const {
    return has_out(at, k) ? pack_at(tensor, out_begin + out(at, k)) : Pack{};
  }
  SELMATCH_DEVICE static const Pack& pack_at(const void* tensor, int64_t element) {
    return *reinterpret_cast<const Pack*>(static_cast<const S*>(tensor) + element);
  }
  SELMATCH_DEVICE static Pack& pack_at(void* tensor, int64_t element) {
    return *reinterpret_cast<Pack*>(static_cast<S*>(tensor) + element);
  }

  // load_one(tensor, k): pack k of a tensor
  template <int kCount, typename Load>
  SELMATCH_DEVICE static void load_pairs(const void* tensor, const void* more, Load load_one, Pair* pairs) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      pairs[k].value = load_one(tensor, k);
    }
    if (more == nullptr) {
      return;
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      pairs[k].more = load_one(more, k);
    }
    if constexpr (V::kFolds) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          pairs[k].value.item[j] += pairs[k].more.item[j];
        }
      }
    }
  }

  template <bool kBackward>
  SELMATCH_DEVICE Cell read(const Place& at) const {
    Cell cell = {};
    const auto pixel_of = [&](const void* tensor, int k) { return load_pixel(tensor, at, k); };
    const auto out_of = [&](const void* tensor, int k) { return load_out(tensor, at, k); };
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      cell.z[k] = load_pixel(call.z, at, k);
    }
    if constexpr (V::kDual) {
      load_pairs<kPixels>(call.zt, call.zt_more, pixel_of, cell.zt);
    }
    if constexpr (kBackward) {
#pragma unroll
      for (int k = 0; k < kOuts; ++k) {
        cell.g[k] = load_out(call.g, at, k);
      }
      if constexpr (V::kDual) {
        load_pairs<kOuts>(call.gt, call.gt_more, out_of, cell.gt);
      }
    }
    return cell;
  }

  // Calls visit(slot, pack) for all packs of a cell that have to be kept.
  template <bool kBackward, typename Visit>
  SELMATCH_DEVICE void each_pack(Cell* cell, Visit visit) const {
    int slot = 0;
    const int outs = V::outs(call);
    const auto each_pair = [&]<int kCount>(Pair(&pairs)[kCount], int count, bool more) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        if (k < count) {
          visit(slot++, pairs[k].value);
        }
      }
      if (!V::kFolds && more) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          if (k < count) {
            visit(slot++, pairs[k].more);
          }
        }
      }
    };
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      visit(slot++, cell->z[k]);
    }
    if constexpr (V::kDual) {
      each_pair(cell->zt, kPixels, call.zt_more != nullptr);
    }
    if constexpr (kBackward) {
#pragma unroll
      for (int k = 0; k < kOuts; ++k) {
        if (k < outs) {
          visit(slot++, cell->g[k]);
        }
      }
      if constexpr (V::kDual) {
        each_pair(cell->gt, outs, call.gt_more != nullptr);
      }
    }
  }

  // --- one channel of a cell, j of the thread's

  SELMATCH_DEVICE BlockParameters<T> pixel_parameters(int pixel, int j) const {
    const int at = pixel + channel + j;
    BlockParameters<T> p = {static_cast<const T*>(call.gamma)[at], static_cast<const T*>(call.beta)[at]};
    if constexpr (V::kDual) {
      p.gamma_t = static_cast<const T*>(call.gamma_t)[at];
      p.beta_t = static_cast<const T*>(call.beta_t)[at];
    }
    return p;
  }

  // p[0] is the channel's and becomes each pixel's, unless pixels have their own.
  SELMATCH_DEVICE void points(const Cell& cell, const Place& at, int j, const BlockChannel<T>& c, BlockParameters<T>* p,
                              BlockPoint<T>* point) const {
#pragma unroll
    for (int k = 1; k < kPixels; ++k) {
      p[k] = p[0];
    }
    if (V::kPerPixel && call.per_pixel) {
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        p[k] = has_pixel(at, k) ? pixel_parameters(pixel(at, k), j) : BlockParameters<T>{};
      }
    }
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      const T z = widen(cell.z[k].item[j]);
      if constexpr (V::kDual) {
        point[k] = block_dual_point(c, p[k], z, cell.zt[k].at(j));
      } else {
        point[k] = block_point(c, p[k], z);
      }
    }
  }

  // How much of each pixel's activation goes into the output; of equal maxima the first takes all.
  SELMATCH_DEVICE void pool_weights(const BlockCurve<T>* curve, T* weight) const {
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      weight[k] = pooled() ? T(0.25) : T(1);
    }
    if (pooled() && call.pool == kBlockMaxPool) {
      T best = curve[0].value;
      int first = 0;
#pragma unroll
      for (int k = 1; k < kPixels; ++k) {
        first = curve[k].value > best ? k : first;
        best = curve[k].value > best ? curve[k].value : best;
      }
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        weight[k] = k == first ? T(1) : T(0);
      }
    }
  }

  // a and at of a cell; a pixel or an output that is not there has read a cotangent of 0.
  SELMATCH_DEVICE void slopes(const Cell& cell, int j, const BlockPoint<T>* point, Slopes* result) const {
    BlockCurve<T> curve[kPixels];
    T weight[kPixels];
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      curve[k] = activation(point[k].n);
    }
    pool_weights(curve, weight);
#pragma unroll
    for (int k = 0; k < kPixels; ++k) {
      const T g = pooled() ? widen(cell.g[0].item[j]) : widen(cell.g[k % kOuts].item[j]);
      const T share = weight[k] * g;
      result[k].a = curve[k].first * share;
      if constexpr (V::kDual) {
        const T gt = pooled() ? cell.gt[0].at(j) : cell.gt[k % kOuts].at(j);
        result[k].at = curve[k].first * (weight[k] * gt) + curve[k].second * point[k].nt * share;
      }
    }
  }
};

// --- a block's work on its slab --------------------------------------------------------------------------------------

// Shared memory: what threads keep | scratch | constants | totals.
template <typename V>
struct BlockMemory {
  using T = typename V::T;
  using Pack = BlockPack<typename V::S, V::kWidth>;

  static SELMATCH_HD int columns(const BlockPlan& plan) { return V::kWidth << plan.lane_bits; }
  static SELMATCH_HD size_t kept_bytes(const BlockPlan& plan) {
    return static_cast<size_t>(plan.kept) * plan.slots * plan.threads * sizeof(Pack);
  }
  static SELMATCH_HD size_t scratch_bytes(const BlockPlan& plan) {
    const size_t sums = V::kWidth * (plan.threads + (1 << plan.lane_bits)) * sizeof(T);
    const size_t parts = columns(plan) * sizeof(BlockMoments);
    return ((sums > parts ? sums : parts) + 15) / 16 * 16;
  }
  static SELMATCH_HD size_t bytes(const BlockPlan& plan) {
    return kept_bytes(plan) + scratch_bytes(plan) + (kConstants + 4) * columns(plan) * sizeof(T);
  }
};

template <typename V, bool kBackward>
struct BlockWork {
  using Slab = BlockSlab<V>;
  using T = typename V::T;
  using Pack = typename Slab::Pack;
  using Cell = typename Slab::Cell;
  using Place = typename Slab::Place;
  using Memory = BlockMemory<V>;
  static constexpr int kWidth = V::kWidth, kPixels = V::kPixels, kCount = V::kCount;

  const BlockCall& call;
  const BlockPlan& plan;
  Slab slab;
  int64_t image;
  int first, width;  // the slab's first channel, and its number of them
  int lane, row, rows, columns;
  bool active;
  Pack* kept;
  unsigned char* scratch;
  T *constants, *totals;  // (kConstants, columns), (4, columns)

  SELMATCH_DEVICE BlockWork(const BlockCall& call_, const BlockPlan& plan_) : call(call_), plan(plan_), slab(call_) {
    const int thread = static_cast<int>(threadIdx.x), lanes = 1 << plan.lane_bits;
    // The second of two launches takes the images the other way round, for what the first one left in the second cache.
    const unsigned block = plan.sums ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
    image = block / plan.slabs;
    first = static_cast<int>(block % plan.slabs) * plan.slab;
    width = call.channels - first < plan.slab ? call.channels - first : plan.slab;
    lane = thread & (lanes - 1);
    row = thread >> plan.lane_bits;
    rows = plan.threads >> plan.lane_bits;
    columns = lanes * kWidth;
    active = lane * kWidth < width;
    slab.channel = first + lane * kWidth;
    slab.set_image(image);
    unsigned char* memory = dynamic_shared<unsigned char>();
    kept = reinterpret_cast<Pack*>(memory) + thread;
    scratch = memory + Memory::kept_bytes(plan);
    constants = reinterpret_cast<T*>(scratch + Memory::scratch_bytes(plan));
    totals = constants + kConstants * columns;
  }

  // Column i of the tables in shared memory is channel column_channel(i) of the slab: threads side by side, and the
  // banks of their memory, are lanes side by side.
  SELMATCH_DEVICE int column_channel(int i) const {
    return (i & ((1 << plan.lane_bits) - 1)) * kWidth + (i >> plan.lane_bits);
  }
  SELMATCH_DEVICE T constant(int k, int j) const { return constants[k * columns + (j << plan.lane_bits) + lane]; }

  // Calls body(column, channel of the slab) for the channels that this thread looks after.
  template <typename Body>
  SELMATCH_DEVICE void each_channel(Body body) const {
    for (int i = static_cast<int>(threadIdx.x); i < columns; i += plan.threads) {
      const int c = column_channel(i);
      if (c < width) {
        body(i, c);
      }
    }
  }

  SELMATCH_DEVICE BlockChannel<T> channel(int j) const {
    BlockChannel<T> c = {constant(kBlockMean, j), constant(kBlockScale, j)};
    if constexpr (V::kDual) {
      c.mean_t = constant(kBlockTangentMean, j);
      c.product = constant(kBlockTangentProduct, j);
    }
    return c;
  }
  SELMATCH_DEVICE BlockParameters<T> parameters(int j) const {
    BlockParameters<T> p = {constant(kGamma, j), constant(kBeta, j)};
    if constexpr (V::kDual) {
      p.gamma_t = constant(kGammaT, j);
      p.beta_t = constant(kBetaT, j);
    }
    return p;
  }

  SELMATCH_DEVICE void load_parameters() const {
    if (call.per_pixel) {
      return;
    }
    each_channel([&](int i, int c) {
      constants[kGamma * columns + i] = static_cast<const T*>(call.gamma)[first + c];
      constants[kBeta * columns + i] = static_cast<const T*>(call.beta)[first + c];
      if constexpr (V::kDual) {
        constants[kGammaT * columns + i] = static_cast<const T*>(call.gamma_t)[first + c];
        constants[kBetaT * columns + i] = static_cast<const T*>(call.beta_t)[first + c];
      }
    });
  }

  SELMATCH_DEVICE T* stats() const {
    return static_cast<T*>(call.stats) + stats_row(call, image) * call.stats_count * call.channels + first;
  }
  SELMATCH_DEVICE T* sums() const { return static_cast<T*>(call.sums) + image * 4 * call.channels + first; }

  // --- sweeps

  SELMATCH_DEVICE Cell first_read(int turn, const Place& at) const {
    Cell cell = slab.template read<kBackward>(at);
    if (turn < plan.kept) {
      Pack* to = kept + static_cast<int64_t>(turn) * plan.slots * plan.threads;
      slab.template each_pack<kBackward>(&cell, [&](int slot, Pack& pack) { to[slot * plan.threads] = pack; });
    }
    return cell;
  }
  SELMATCH_DEVICE Cell second_read(int turn, const Place& at) const {
    if (turn >= plan.kept) {
      return slab.template read<kBackward>(at);
    }
    Cell cell = {};
    const Pack* from = kept + static_cast<int64_t>(turn) * plan.slots * plan.threads;
    slab.template each_pack<kBackward>(&cell, [&](int slot, Pack& pack) { pack = from[slot * plan.threads]; });
    return cell;
  }

  // Calls body(turn, place) for the cells of this thread.
  template <typename Body>
  SELMATCH_DEVICE void each_cell(Body body) const {
    if (active) {
      int turn = 0;
      for (int cell = row; cell < plan.cells; cell += rows, ++turn) {
        body(turn, slab.place(cell, plan.cell_columns));
      }
    }
  }
  // The same from the last one to the first: what was not kept was read last and is likeliest in the second cache.
  template <typename Body>
  SELMATCH_DEVICE void each_cell_backwards(Body body) const {
    if (active) {
      int turn = (plan.cells - row + rows - 1) / rows - 1;
      for (int cell = row + turn * rows; cell >= 0; cell -= rows, --turn) {
        body(turn, slab.place(cell, plan.cell_columns));
      }
    }
  }

  // Adds up the threads' sums of each channel, row after row, into totals.
  SELMATCH_DEVICE void reduce(const T (&sum)[kCount][kWidth]) const {
    T* table = reinterpret_cast<T*>(scratch);
    const int lanes = 1 << plan.lane_bits, stride = plan.threads + lanes;  // the further lanes keep banks apart
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        table[j * stride + threadIdx.x] = sum[k][j];
      }
      __syncthreads();
      each_channel([&](int i, int) {
        const T* column = table + (i >> plan.lane_bits) * stride + (i & (lanes - 1));
        T total = 0;
        for (int r = 0; r < rows; ++r) {
          total += column[r * lanes];
        }
        totals[k * columns + i] = total;
      });
      __syncthreads();
    }
  }

  // Merges the parts of each norm group, which begin at multiples of `size`, into the group's first.
  template <typename Part>
  SELMATCH_DEVICE void merge_groups(Part* parts, int size) const {
    for (int step = 1; step < size; step *= 2) {
      __syncthreads();
      for (int c = static_cast<int>(threadIdx.x); c < width; c += plan.threads) {
        const int member = c % size;
        if (member % (2 * step) == 0 && member + step < size) {
          merge_part(parts + c, parts[c + step]);
        }
      }
    }
    __syncthreads();
  }
  SELMATCH_DEVICE int group_size() const { return call.channels / call.groups; }

  // --- forward

  // Sums of d = z - first pixel, d^2, zt and d zt: the first pixel is close enough to the mean for nothing to cancel.
  SELMATCH_DEVICE void sum_moments() const {
    T sum[kCount][kWidth] = {};
    if (active) {
      const Pack shift = Slab::pack_at(call.z, slab.begin);
      each_cell([&](int turn, const Place& at) {
        const Cell cell = first_read(turn, at);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
#pragma unroll
          for (int k = 0; k < kPixels; ++k) {
            if (slab.has_pixel(at, k)) {
              const T d = widen(cell.z[k].item[j]) - widen(shift.item[j]);
              sum[0][j] += d;
              sum[1][j] += d * d;
              if constexpr (V::kDual) {
                const T t = cell.zt[k].at(j);
                sum[2][j] += t;
                sum[3][j] += d * t;
              }
            }
          }
        }
      });
    }
    reduce(sum);
  }

  SELMATCH_DEVICE BlockMoments moments(int i, int c) const {
    const double count = slab.pixels(), first_sum = totals[i], mean = first_sum / count;
    const auto shift = static_cast<const typename V::S*>(call.z)[image * slab.pixels() * call.channels + first + c];
    BlockMoments result = {count, static_cast<double>(widen(shift)) + mean, totals[columns + i] - mean * first_sum};
    if constexpr (V::kDual) {
      const double tangents = totals[2 * columns + i];
      result.mean_t = tangents / count;
      result.products = totals[3 * columns + i] - mean * tangents;
    }
    return result;
  }

  SELMATCH_DEVICE void write_moments() const {
    each_channel([&](int i, int c) {
      const BlockMoments all = moments(i, c);
      const double values[] = {all.mean, all.squares, all.mean_t, all.products};
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        sums()[k * call.channels + c] = static_cast<T>(values[k]);
      }
    });
  }

  SELMATCH_DEVICE void make_stats() const {
    BlockMoments* parts = reinterpret_cast<BlockMoments*>(scratch);
    const int size = group_size();
    each_channel([&](int i, int c) { parts[c] = moments(i, c); });
    merge_groups(parts, size);
    each_channel([&](int i, int c) {
      T values[kBlockStats];
      moments_to_stats(parts[c - c % size], call.eps, values);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        constants[k * columns + i] = values[k];
        stats()[k * call.channels + c] = values[k];
      }
    });
  }

  SELMATCH_DEVICE void load_stats() const {
    each_channel([&](int i, int c) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        constants[k * columns + i] = stats()[k * call.channels + c];
      }
    });
  }

  SELMATCH_DEVICE void make_plain_stats() const {  // without a norm
    each_channel([&](int i, int c) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        constants[k * columns + i] = T(k == kBlockScale);
        if (image == 0) {
          stats()[k * call.channels + c] = T(k == kBlockScale);
        }
      }
    });
  }

  SELMATCH_DEVICE void apply_forward() const {
    each_cell_backwards([&](int turn, const Place& at) {
      Cell cell = second_read(turn, at);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        BlockParameters<T> p[kPixels] = {parameters(j)};
        BlockPoint<T> point[kPixels];
        BlockCurve<T> curve[kPixels];
        T weight[kPixels], value[V::kOuts] = {}, tangent[V::kOuts] = {};
        slab.points(cell, at, j, channel(j), p, point);
#pragma unroll
        for (int k = 0; k < kPixels; ++k) {
          curve[k] = slab.activation(point[k].n);
        }
        slab.pool_weights(curve, weight);
#pragma unroll
        for (int k = 0; k < kPixels; ++k) {
          if (weight[k] == T(0)) {
            continue;  // or an infinite value that is not the largest would make a NaN
          }
          const T part = weight[k] * curve[k].value, part_t = weight[k] * curve[k].first * point[k].nt;
          if (slab.pooled()) {  // two constant places, or the arrays would not be registers
            value[0] += part;
            tangent[0] += part_t;
          } else {
            value[k % V::kOuts] += part;
            tangent[k % V::kOuts] += part_t;
          }
        }
#pragma unroll
        for (int k = 0; k < V::kOuts; ++k) {  // over what was read and is no longer needed
          narrow(value[k], &cell.z[k].item[j]);
          if constexpr (V::kDual) {
            narrow(tangent[k], &cell.zt[k].value.item[j]);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < V::kOuts; ++k) {
        if (slab.has_out(at, k)) {
          const int64_t to = slab.out_begin + slab.out(at, k);
          Slab::pack_at(call.y, to) = cell.z[k];
          if constexpr (V::kDual) {
            Slab::pack_at(call.yt, to) = cell.zt[k].value;
          }
        }
      }
    });
  }

  SELMATCH_DEVICE void forward() const {
    load_parameters();
    if (plan.sums) {
      sum_moments();
      if (!plan.apply) {
        return write_moments();
      }
      make_stats();
    } else if (call.norm == kBlockNoNorm) {
      make_plain_stats();
    } else {
      load_stats();
    }
    __syncthreads();
    apply_forward();
  }

  // --- backward

  // Sums of a, a zh, at and at zh + a zht; per_pixel, of q, q zh, qt and qt zh + q zht.
  SELMATCH_DEVICE void sum_cotangents() const {
    T sum[kCount][kWidth] = {};
    each_cell([&](int turn, const Place& at) {
      const Cell cell = first_read(turn, at);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        BlockParameters<T> p[kPixels] = {parameters(j)};
        BlockPoint<T> point[kPixels];
        typename Slab::Slopes slopes[kPixels];
        slab.points(cell, at, j, channel(j), p, point);
        slab.slopes(cell, j, point, slopes);
#pragma unroll
        for (int k = 0; k < kPixels; ++k) {
          T a = slopes[k].a, a_t = slopes[k].at;
          if (V::kPerPixel && call.per_pixel) {
            if constexpr (V::kDual) {
              a_t = p[k].gamma_t * a + p[k].gamma * a_t;
            }
            a *= p[k].gamma;
          }
          sum[0][j] += a;
          sum[1][j] += a * point[k].zh;
          if constexpr (V::kDual) {
            sum[2][j] += a_t;
            sum[3][j] += a_t * point[k].zh + a * point[k].zht;
          }
        }
      }
    });
    reduce(sum);
  }

  SELMATCH_DEVICE void write_cotangents() const {
    each_channel([&](int i, int c) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        sums()[k * call.channels + c] = totals[k * columns + i];
      }
    });
  }

  SELMATCH_DEVICE void make_means() const {
    BlockSums* parts = reinterpret_cast<BlockSums*>(scratch);
    const int size = group_size();
    each_channel([&](int i, int c) {
      BlockSums of = {};
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        of.sum[k] = totals[k * columns + i];
      }
      parts[c] = weighted<T>(call, first + c, of);
    });
    merge_groups(parts, size);
    const double share = 1 / (static_cast<double>(slab.pixels()) * size);
    each_channel([&](int i, int c) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        constants[(kMeans + k) * columns + i] = static_cast<T>(parts[c - c % size].sum[k] * share);
      }
    });
  }

  SELMATCH_DEVICE void load_means() const {
    const T* from = static_cast<const T*>(call.means) + stats_row(call, image) * kBlockMeans * call.channels + first;
    each_channel([&](int i, int c) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        constants[(kMeans + k) * columns + i] = call.norm == kBlockNoNorm ? T(0) : from[k * call.channels + c];
      }
    });
  }

  SELMATCH_DEVICE void apply_backward() const {
    each_cell_backwards([&](int turn, const Place& at) {
      Cell cell = second_read(turn, at);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        BlockParameters<T> p[kPixels] = {parameters(j)};
        BlockPoint<T> point[kPixels];
        typename Slab::Slopes slopes[kPixels];
        const BlockChannel<T> c = channel(j);
        BlockBackMeans<T> mean = {constant(kMeans + kBlockQ, j), constant(kMeans + kBlockQz, j)};
        if constexpr (V::kDual) {
          mean.qt = constant(kMeans + kBlockQt, j);
          mean.qzt = constant(kMeans + kBlockQzt, j);
        }
        slab.points(cell, at, j, c, p, point);
        slab.slopes(cell, j, point, slopes);
#pragma unroll
        for (int k = 0; k < kPixels; ++k) {
          const T gz = block_gz(c, mean, point[k].zh, p[k].gamma * slopes[k].a);
          narrow(gz, &cell.z[k].item[j]);
          if constexpr (V::kDual) {
            const T qt = p[k].gamma_t * slopes[k].a + p[k].gamma * slopes[k].at;
            narrow(block_gzt(c, mean, point[k], qt, gz), &cell.zt[k].value.item[j]);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        if (slab.has_pixel(at, k)) {
          const int64_t to = slab.begin + slab.pixel(at, k);
          Slab::pack_at(call.gz, to) = cell.z[k];
          if constexpr (V::kDual) {
            Slab::pack_at(call.gzt, to) = cell.zt[k].value;
          }
        }
      }
    });
  }

  SELMATCH_DEVICE void backward() const {
    load_parameters();
    load_stats();
    if (plan.sums) {
      __syncthreads();
      sum_cotangents();
      write_cotangents();
      if (!plan.apply) {
        return;
      }
      make_means();
    } else {
      load_means();
    }
    __syncthreads();
    apply_backward();
  }
};

// --- between the sweeps, and after them ------------------------------------------------------------------------------

// What one block merges: kMergeColumns channels over the batch, each by itself, or the channels of one image's group.
struct MergeTask {
  bool over_batch;
  int columns, size, first;  // columns: threads side by side that stay apart
  int64_t row, items;

  SELMATCH_DEVICE MergeTask(const BlockCall& call, bool over_batch_) : over_batch(over_batch_) {
    columns = over_batch ? kMergeColumns : 1;
    size = over_batch ? kMergeColumns : call.channels / call.groups;
    row = over_batch ? 0 : blockIdx.x / call.groups;
    first = static_cast<int>(over_batch ? blockIdx.x : blockIdx.x % call.groups) * size;
    items = over_batch ? call.batch : size;
  }

  // read(image, channel) gives a part; write(channel, part) gets the merged one, for each channel.
  template <typename Part, typename Read, typename Write>
  SELMATCH_DEVICE void run(int channels, Part* parts, Read read, Write write) const {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    Part part = {};
    if (!over_batch || first + thread % columns < channels) {
#pragma unroll 4  // so many loads under way
      for (int64_t item = thread / columns; item < items; item += threads / columns) {
        merge_part(&part,
                   over_batch ? read(item, first + thread % columns) : read(row, first + static_cast<int>(item)));
      }
    }
    parts[thread] = part;
    for (int half = threads / 2; half >= columns; half /= 2) {
      __syncthreads();
      if (thread < half) {
        merge_part(parts + thread, parts[thread + half]);
      }
    }
    __syncthreads();
    for (int k = thread; k < size && first + k < channels; k += threads) {
      write(first + k, parts[over_batch ? k : 0]);
    }
  }
};

// The four sums of one image and channel; without tangents the last two are 0.
template <typename T>
SELMATCH_DEVICE BlockSums read_sums(const BlockCall& call, int64_t image, int c) {
  const int64_t channels = call.channels;
  const bool dual = call.stats_count == kBlockStats;
  const T* from = static_cast<const T*>(call.sums) + image * 4 * channels + c;
  return {{from[0], from[channels], dual ? from[2 * channels] : T(0), dual ? from[3 * channels] : T(0)}};
}

// --- launching -------------------------------------------------------------------------------------------------------

inline int round_up(int value, int to) { return (value + to - 1) / to * to; }

template <typename V, bool kBackward>
struct BlockPlanner {
  using Pack = BlockPack<typename V::S, V::kWidth>;
  using Memory = BlockMemory<V>;
  const BlockCall& call;
  const int64_t budget;  // of shared memory
  BlockPlan plan = {};

  explicit BlockPlanner(const BlockCall& call_)
      : call(call_), budget((static_cast<int64_t>(shared_memory_limit()) + 1024) / V::resident(kBackward) - 1024) {
    plan.cell_columns = (call.width + 1) / 2;
    plan.cells = V::pooled(call) ? plan.cell_columns * ((call.height + 1) / 2)
                                 : round_up(call.height * call.width, V::kPixels) / V::kPixels;
    const auto packs = [](int count, const void* more) {
      return count * (1 + V::kDual * (1 + (!V::kFolds && more != nullptr)));
    };
    plan.slots = packs(V::kPixels, call.zt_more) + (kBackward ? packs(V::outs(call), call.gt_more) : 0);
  }

  int bits_for(int lanes) const {
    int bits = 0;
    while ((1 << bits) < lanes) {
      ++bits;
    }
    return bits;
  }

  // A slab as wide as 2^bits lanes: whether all that is read of it fits.
  bool shape(int bits) {
    plan.lane_bits = bits;
    const int64_t wanted = static_cast<int64_t>(plan.cells) << bits;
    plan.threads = wanted < V::threads(kBackward) ? round_up(static_cast<int>(wanted), 32) : V::threads(kBackward);
    const int rows = plan.threads >> bits, turns = round_up(plan.cells, rows) / rows;
    plan.kept = 0;
    const int64_t left = budget - static_cast<int64_t>(Memory::bytes(plan));
    const int64_t turn_bytes = static_cast<int64_t>(plan.slots) * plan.threads * sizeof(Pack);
    plan.kept = static_cast<int>(std::clamp<int64_t>(left / turn_bytes, 0, turns));
    return plan.kept == turns;
  }

  BlockPlan make() {
    constexpr int kPackBytes = sizeof(Pack);
    const int full = bits_for((call.channels + V::kWidth - 1) / V::kWidth);
    const int wide = std::min(full, bits_for(std::min(kMaxLanes, 128 / kPackBytes)));
    const int narrow = std::min(full, bits_for(std::min(kMaxLanes, 64 / kPackBytes)));
    if (!shape(wide) && call.norm == kBlockSampleNorm) {
      shape(narrow);
    }
    plan.slab = V::kWidth << plan.lane_bits;
    plan.sums = plan.apply = call.norm == kBlockSampleNorm;
    if (call.norm == kBlockSampleNorm) {
      int unit = call.channels / call.groups;  // whole groups, beginning at a pack
      while (unit % V::kWidth != 0) {
        unit += call.channels / call.groups;
      }
      if (unit > plan.slab) {
        const int bits = bits_for((unit + V::kWidth - 1) / V::kWidth);
        plan.sums = plan.apply = (1 << bits) <= kMaxLanes && (shape(bits) || bits <= wide);
        if (!plan.apply) {
          shape(wide);
        }
      }
      plan.slab = V::kWidth << plan.lane_bits;
      if (plan.apply) {
        plan.slab -= plan.slab % unit;
      }
    }
    plan.slabs = round_up(call.channels, plan.slab) / plan.slab;
    return plan;
  }
};

// Both sweeps in one launch, or one of them.
template <typename V>
void sweep(void (*kernel)(BlockCall, BlockPlan), const BlockCall& call, BlockPlan plan, bool sums, bool apply,
           void* stream) {
  plan.sums = sums;
  plan.apply = apply;
  if (!sums || !apply) {
    plan.kept = 0;
  }
  launch(kernel, call.batch * plan.slabs, plan.threads, BlockMemory<V>::bytes(plan), stream, call, plan);
}

inline int64_t merge_blocks(const BlockCall& call, bool over_batch) {
  return over_batch ? (call.channels + kMergeColumns - 1) / kMergeColumns : call.batch * call.groups;
}

// Whether every pixel of every image begins at a multiple of `bytes`.
inline bool is_aligned(const BlockCall& call, size_t item, size_t bytes) {
  const void* tensors[] = {call.z,       call.zt, call.zt_more, call.g,  call.gt,
                           call.gt_more, call.y,  call.yt,      call.gz, call.gzt};
  return call.channels * item % bytes == 0 &&
         std::all_of(std::begin(tensors), std::end(tensors),
                     [&](const void* tensor) { return reinterpret_cast<uintptr_t>(tensor) % bytes == 0; });
}

// Calls run(the variant that makes the call). What the wide kernels cannot do is done channel by channel, by one kernel
// for all activations and poolings: most of the time of a compilation would go into variants that hardly ever run.
template <typename S, typename T, bool kDual, typename Run>
void run_type(const BlockCall& call, Run run) {
  if constexpr (!std::is_same_v<S, double>) {  // double is for checks, not for speed
    constexpr int kWidth = kDual ? 4 : 16 / sizeof(S);
    if (!call.per_pixel && is_aligned(call, sizeof(S), kWidth * sizeof(S))) {
      const auto run_activation = [&]<typename Activation>(std::type_identity<Activation>) {
        if (call.pool != kBlockNoPool) {
          return run(BlockVariant<S, T, kWidth, Activation, kDual, Pooling::kAlways>());
        }
        run(BlockVariant<S, T, kWidth, Activation, kDual, Pooling::kNever>());
      };
      if (call.activation == kBlockPiecewise) {
        return run_activation(std::type_identity<PiecewiseActivation<T>>());
      }
      return run_activation(std::type_identity<SmoothActivation<T>>());
    }
  }
  run(BlockVariant<S, T, 1, AnyActivation<T>, kDual, Pooling::kAny>());
}

template <bool kDual, typename Run>
void run_variant(const BlockCall& call, Run run) {
  switch (call.type) {
    case BlockType::kFloat:
      return run_type<float, float, kDual>(call, run);
    case BlockType::kDouble:
      return run_type<double, double, kDual>(call, run);
    case BlockType::kBfloat16:
      return run_type<bfloat16_t, float, kDual>(call, run);
  }
}

}  // namespace
}  // namespace selmatch
