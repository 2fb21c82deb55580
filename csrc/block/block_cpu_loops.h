// The CPU loops of a block. block_cpu_type.h includes this once for each set of vector instructions, in a namespace
// of its own, so there is no include guard; SELMATCH_LANES is the bytes of a vector: 16, 32 (AVX2) or 64
// (AVX-512).
//
// Every loop walks pixel by pixel through all channels, which is the order of memory. Pixels are taken by the cell: the
// 2 x 2 pixels that are pooled into one, or a single one. An image (of one convolution of width 128 at 32 x 32: 512 KB)
// is read twice, once for its sums and once to be written, and stays in the second cache in between. With statistics of
// the batch all images are read for their sums, from the last to the first, and then from the first to the last: each
// time begins with what the cache still holds. What works on a cell is inlined by force (SELMATCH_HD): its arrays then
// are registers, and everything takes half the time.

template <typename T>
struct BlockVectors {
  static constexpr int kLanes = SELMATCH_LANES / sizeof(T);
  typedef T lanes __attribute__((vector_size(SELMATCH_LANES)));
  typedef uint32_t words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  typedef uint16_t halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
};

// Vectors from and to memory of any alignment.
template <typename V>
SELMATCH_HD V load_bytes(const void* p) {
  V value;
  std::memcpy(&value, p, sizeof(V));
  return value;
}

// V = T or its vector, from and to memory of type S
template <typename V, typename S>
SELMATCH_HD V load(const S* p) {
  if constexpr (sizeof(V) <= sizeof(double)) {
    return widen(*p);
  } else if constexpr (sizeof(S) == 2) {
    using Vectors = BlockVectors<float>;
    const auto halves = load_bytes<typename Vectors::halves>(p);
    return reinterpret_cast<V>(__builtin_convertvector(halves, typename Vectors::words) << 16);
  } else {
    return load_bytes<V>(p);
  }
}

template <typename V, typename S>
SELMATCH_HD void store(V value, S* p) {
  if constexpr (sizeof(V) <= sizeof(double)) {
    narrow(value, p);
  } else if constexpr (sizeof(S) == 2) {
    using Vectors = BlockVectors<float>;
    using Words = typename Vectors::words;
    const Words bits = reinterpret_cast<Words>(value);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words result = (bits & 0x7fffffffu) > 0x7f800000u ? (rounded | 0x7fc0u) : rounded;  // NaN stays NaN
    const auto halves = __builtin_convertvector(result, typename Vectors::halves);
    std::memcpy(p, &halves, sizeof(halves));
  } else {
    std::memcpy(p, &value, sizeof(value));
  }
}

SELMATCH_HD float exp_of(float x) { return std::exp(x); }
SELMATCH_HD double exp_of(double x) { return std::exp(x); }

// exp(x) = 2^k exp(x - k log 2), the second factor by its Taylor series: within 2 units in the last place.
SELMATCH_HD BlockVectors<float>::lanes exp_of(BlockVectors<float>::lanes x) {
  using V = BlockVectors<float>::lanes;
  typedef int32_t ints __attribute__((vector_size(SELMATCH_LANES)));
  const V low = V{} - 87.0f, high = V{} + 88.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const V magic = V{} + 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number in the last bits
  const V shifted = x * 1.44269504f + magic, k = shifted - magic;
  const V r = x - k * 0.693145752f - k * 1.42860677e-6f;
  V sum = V{} + 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r * r + r + 1.0f;
  const ints exponent = (reinterpret_cast<ints>(shifted) - 0x4b400000 + 127) << 23;
  return sum * reinterpret_cast<V>(exponent);
}

SELMATCH_HD BlockVectors<double>::lanes exp_of(BlockVectors<double>::lanes x) {
  for (int k = 0; k < BlockVectors<double>::kLanes; ++k) {
    x[k] = std::exp(x[k]);
  }
  return x;
}

#include "block/block_math.h"

// Up to four pixels of one image, and the pixel of the output that they are pooled into; none: out < 0.
struct BlockCell {
  int64_t pixel[4];
  int64_t out;
};

template <typename S, typename T, typename Activation>
struct BlockLoops {
  using Lanes = typename BlockVectors<T>::lanes;
  static constexpr int kLanes = BlockVectors<T>::kLanes;

  const BlockCall& call;
  const Activation activation;
  const int channels, height, width;
  const int out_height, out_width;
  const int64_t pixels, outs;  // of one image

  explicit BlockLoops(const BlockCall& call_)
      : call(call_),
        activation(call_),
        channels(call_.channels),
        height(call_.height),
        width(call_.width),
        out_height(call_.pool == kBlockNoPool ? height : height / 2),
        out_width(call_.pool == kBlockNoPool ? width : width / 2),
        pixels(static_cast<int64_t>(height) * width),
        outs(static_cast<int64_t>(out_height) * out_width) {}

  // --- one image's part of the call ----------------------------------------------------------------------------------

  const S* in(const void* tensor, int64_t n) const {
    return tensor == nullptr ? nullptr : static_cast<const S*>(tensor) + n * pixels * channels;
  }
  const S* in_pooled(const void* tensor, int64_t n) const {
    return tensor == nullptr ? nullptr : static_cast<const S*>(tensor) + n * outs * channels;
  }
  S* out(void* tensor, int64_t n) const { return static_cast<S*>(tensor) + n * pixels * channels; }
  S* out_pooled(void* tensor, int64_t n) const { return static_cast<S*>(tensor) + n * outs * channels; }
  int64_t row(int64_t n) const { return call.norm == kBlockSampleNorm ? n : 0; }
  T* stats(int64_t n) const { return static_cast<T*>(call.stats) + row(n) * call.stats_count * channels; }
  T* means(int64_t n) const { return static_cast<T*>(call.means) + row(n) * kBlockMeans * channels; }
  T* sums(int64_t n) const { return static_cast<T*>(call.sums) + n * 4 * channels; }

  // --- walking -------------------------------------------------------------------------------------------------------

  // Calls kernel.at<V, pixels of the cell>(cell, c) for all channels c.
  template <int kPixels, typename Kernel>
  void visit(Kernel& kernel, const BlockCell& cell) const {
    int c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      kernel.template at<Lanes, kPixels>(cell, c);
    }
    for (; c < channels; ++c) {
      kernel.template at<T, kPixels>(cell, c);
    }
  }

  // The cells of row i of the output; what pooling leaves out of the input's rows is visited where `all`.
  template <typename Kernel>
  void visit_row(Kernel& kernel, int i, bool all) const {
    if (call.pool == kBlockNoPool) {
      for (int64_t p = static_cast<int64_t>(i) * width, end = p + width; p < end; ++p) {
        visit<1>(kernel, {{p}, p});
      }
      return;
    }
    const int64_t first = 2 * static_cast<int64_t>(i) * width;
    if (i < out_height) {
      for (int j = 0; j < out_width; ++j) {
        const int64_t p = first + 2 * j;
        visit<4>(kernel, {{p, p + 1, p + width, p + width + 1}, static_cast<int64_t>(i) * out_width + j});
      }
    }
    if (all && (i == out_height || width % 2 != 0)) {
      for (int64_t p = first; p < first + 2 * width && p < pixels; ++p) {
        if (i == out_height || p % width >= 2 * out_width) {
          visit<1>(kernel, {{p}, -1});
        }
      }
    }
  }

  template <typename Kernel>
  void visit_outputs(Kernel& kernel) const {
    for (int i = 0; i < out_height; ++i) {
      visit_row(kernel, i, false);
    }
  }

  template <typename Kernel>
  void visit_all(Kernel& kernel) const {
    const int rows = call.pool == kBlockNoPool ? height : (height + 1) / 2;
    for (int i = 0; i < rows; ++i) {
      visit_row(kernel, i, true);
    }
  }

  // --- what every kernel loads ---------------------------------------------------------------------------------------

  // Of one cell: a value for each pixel, from a tensor like z that may be the sum of two.
  template <typename V, int kPixels>
  SELMATCH_HD void load_cell(const S* tensor, const S* more, const BlockCell& cell, int c, V* values) const {
    for (int k = 0; k < kPixels; ++k) {
      values[k] = load<V>(tensor + cell.pixel[k] * channels + c);
    }
    if (more != nullptr) {
      for (int k = 0; k < kPixels; ++k) {
        values[k] += load<V>(more + cell.pixel[k] * channels + c);
      }
    }
  }

  template <typename V>
  SELMATCH_HD V load_out(const S* tensor, const S* more, const BlockCell& cell, int c) const {
    if (cell.out < 0) {
      return V{};
    }
    const V value = load<V>(tensor + cell.out * channels + c);
    return more == nullptr ? value : value + load<V>(more + cell.out * channels + c);
  }

  template <typename V, bool kDual>
  SELMATCH_HD BlockParameters<V> load_parameters(int64_t offset) const {
    const T *gamma = static_cast<const T*>(call.gamma), *beta = static_cast<const T*>(call.beta);
    BlockParameters<V> p = {load<V>(gamma + offset), load<V>(beta + offset)};
    if (kDual) {
      p.gamma_t = load<V>(static_cast<const T*>(call.gamma_t) + offset);
      p.beta_t = load<V>(static_cast<const T*>(call.beta_t) + offset);
    }
    return p;
  }

  template <typename V, bool kDual>
  SELMATCH_HD BlockChannel<V> load_channel(const T* stats, int c) const {
    BlockChannel<V> s = {load<V>(stats + c), load<V>(stats + channels + c)};
    if (kDual) {
      s.mean_t = load<V>(stats + 2 * channels + c);
      s.product = load<V>(stats + 3 * channels + c);
    }
    return s;
  }

  // The normalized pixels of a cell; parameters[k] is pixel k's.
  template <typename V, int kPixels, bool kDual>
  SELMATCH_HD void points(const BlockChannel<V>& channel, const S* z, const S* zt, const S* zt_more,
                          const BlockCell& cell, int c, BlockParameters<V>* parameters, BlockPoint<V>* result) const {
    V value[kPixels], tangent[kPixels];
    load_cell<V, kPixels>(z, nullptr, cell, c, value);
    parameters[0] = load_parameters<V, kDual>(call.per_pixel ? cell.pixel[0] * channels + c : c);
    for (int k = 1; k < kPixels; ++k) {
      parameters[k] = call.per_pixel ? load_parameters<V, kDual>(cell.pixel[k] * channels + c) : parameters[0];
    }
    if constexpr (kDual) {
      load_cell<V, kPixels>(zt, zt_more, cell, c, tangent);
      for (int k = 0; k < kPixels; ++k) {
        result[k] = block_dual_point(channel, parameters[k], value[k], tangent[k]);
      }
    } else {
      for (int k = 0; k < kPixels; ++k) {
        result[k] = block_point(channel, parameters[k], value[k]);
      }
    }
  }

  // How much of each pixel's activation goes into the output; of equal maxima the first takes all.
  // What is lower becomes 0 and not only its weight, or -inf would spoil the others of its cell; NaN does, as in torch.
  template <typename V, int kPixels>
  SELMATCH_HD void pool_weights(BlockCurve<V>* curves, BlockPoint<V>* point, V* weights) const {
    const V zero = {}, one = zero + T(1);
    if (call.pool != kBlockMaxPool || kPixels == 1) {
      for (int k = 0; k < kPixels; ++k) {
        weights[k] = zero + T(1) / kPixels;
      }
      return;
    }
    V best = curves[0].value;
    weights[0] = one;
    for (int k = 1; k < kPixels; ++k) {
      const auto higher = curves[k].value > best;
      best = higher ? curves[k].value : best;
      weights[k] = higher ? one : zero;
      for (int before = 0; before < k; ++before) {
        weights[before] = higher ? zero : weights[before];
      }
    }
    for (int k = 0; k < kPixels; ++k) {
      const auto lower = curves[k].value < best;
      curves[k] = {lower ? zero : curves[k].value, lower ? zero : curves[k].first, lower ? zero : curves[k].second};
      point[k].nt = lower ? zero : point[k].nt;
    }
  }

  // --- moments of z and of its tangent -------------------------------------------------------------------------------

  // Sums of d = z - first pixel, d^2, zt and d zt: the first pixel is close enough to the mean for nothing to cancel.
  template <bool kDual>
  struct Moments {
    const BlockLoops& loops;
    const S *z, *zt, *zt_more;
    T* total;  // (4, channels)

    template <typename V, int kPixels>
    SELMATCH_HD void at(const BlockCell& cell, int c) {
      const int stride = loops.channels;
      V value[kPixels], tangent[kPixels];
      loops.template load_cell<V, kPixels>(z, nullptr, cell, c, value);
      if (kDual) {
        loops.template load_cell<V, kPixels>(zt, zt_more, cell, c, tangent);
      }
      const V shift = load<V>(z + c);
      V sum = {}, squares = {}, sum_t = {}, products = {};
      for (int k = 0; k < kPixels; ++k) {
        const V d = value[k] - shift;
        sum += d;
        squares += d * d;
        if (kDual) {
          sum_t += tangent[k];
          products += d * tangent[k];
        }
      }
      add(total + c, sum);
      add(total + stride + c, squares);
      if (kDual) {
        add(total + 2 * stride + c, sum_t);
        add(total + 3 * stride + c, products);
      }
    }
  };

  template <typename V>
  static SELMATCH_HD void add(T* p, V value) {
    store(load<V>(p) + value, p);
  }

  // Image n's mean, sum of squares, tangent's mean and sum of products of each channel into sums(n). Pixels are added
  // up in runs, and the runs then: fewer additions to one number, smaller rounding errors.
  template <bool kDual>
  void moments(int64_t n, T* run) const {
    constexpr int kRun = 64;
    const int count = kDual ? 4 : 2;
    T* total = sums(n);
    std::fill_n(total, 4 * channels, T(0));
    Moments<kDual> kernel = {*this, in(call.z, n), in(call.zt, n), in(call.zt_more, n), run};
    for (int64_t begin = 0; begin < pixels; begin += kRun) {
      const int64_t end = std::min(begin + kRun, pixels);
      std::fill_n(run, count * channels, T(0));
      int64_t p = begin;
      for (; p + 4 <= end; p += 4) {
        visit<4>(kernel, {{p, p + 1, p + 2, p + 3}, -1});
      }
      for (; p < end; ++p) {
        visit<1>(kernel, {{p}, -1});
      }
      for (int i = 0; i < count * channels; ++i) {
        total[i] += run[i];
      }
    }
    for (int c = 0; c < channels; ++c) {
      T &first = total[c], &second = total[channels + c], &third = total[2 * channels + c],
        &fourth = total[3 * channels + c];
      const double d = static_cast<double>(first) / pixels, t = static_cast<double>(third) / pixels;
      second -= static_cast<T>(d * first);
      fourth -= static_cast<T>(d * third);
      first = static_cast<T>(static_cast<double>(load<T>(kernel.z + c)) + d);
      third = static_cast<T>(t);
    }
  }

  // Statistics of the norm groups of one row (one image, or all of them) from the images' moments.
  void make_stats(int64_t begin, int64_t end) const {
    const int size = call.norm == kBlockBatchNorm ? 1 : channels / call.groups;
    T* to = stats(begin);
    for (int first = 0; first < channels; first += size) {
      BlockMoments all = {0, 0, 0, 0, 0};
      for (int64_t n = begin; n < end; ++n) {
        const T* from = sums(n);
        for (int c = first; c < first + size; ++c) {
          all.merge({static_cast<double>(pixels), from[c], from[channels + c], from[2 * channels + c],
                     from[3 * channels + c]});
        }
      }
      const double scale = 1 / std::sqrt(all.squares / all.count + call.eps);
      const double values[] = {all.mean, scale, all.mean_t, scale * all.products / all.count};
      for (int k = 0; k < call.stats_count; ++k) {
        std::fill_n(to + k * channels + first, size, static_cast<T>(values[k]));
      }
    }
  }

  void make_plain_stats() const {  // without a norm
    T* to = stats(0);
    std::fill_n(to, call.stats_count * channels, T(0));
    std::fill_n(to + channels, channels, T(1));
  }

  // --- forward -------------------------------------------------------------------------------------------------------

  template <bool kDual>
  struct Forward {
    const BlockLoops& loops;
    const S *z, *zt, *zt_more;
    const T* stats;
    S *y, *yt;

    template <typename V, int kPixels>
    SELMATCH_HD void at(const BlockCell& cell, int c) {
      BlockParameters<V> parameters[kPixels];
      BlockPoint<V> point[kPixels];
      BlockCurve<V> curve[kPixels];
      V weight[kPixels], value = {}, tangent = {};
      const auto channel = loops.template load_channel<V, kDual>(stats, c);
      loops.template points<V, kPixels, kDual>(channel, z, zt, zt_more, cell, c, parameters, point);
      for (int k = 0; k < kPixels; ++k) {
        curve[k] = loops.activation(point[k].n);
      }
      loops.template pool_weights<V, kPixels>(curve, point, weight);
      for (int k = 0; k < kPixels; ++k) {
        value += weight[k] * curve[k].value;
        if (kDual) {
          tangent += weight[k] * curve[k].first * point[k].nt;
        }
      }
      store(value, y + cell.out * loops.channels + c);
      if (kDual) {
        store(tangent, yt + cell.out * loops.channels + c);
      }
    }
  };

  template <bool kDual>
  void forward(int64_t n) const {
    Forward<kDual> kernel = {*this,
                             in(call.z, n),
                             in(call.zt, n),
                             in(call.zt_more, n),
                             stats(n),
                             out_pooled(call.y, n),
                             kDual ? out_pooled(call.yt, n) : nullptr};
    visit_outputs(kernel);
  }

  // --- backward ------------------------------------------------------------------------------------------------------

  // What the backward pass knows at one pixel: a and at.
  template <typename V>
  struct Slopes {
    V a, at;
  };

  template <bool kDual>
  struct Reader {
    const BlockLoops& loops;
    const S *z, *zt, *zt_more, *g, *gt, *gt_more;
    const T* stats;

    Reader(const BlockLoops& l, int64_t n)
        : loops(l),
          z(l.in(l.call.z, n)),
          zt(l.in(l.call.zt, n)),
          zt_more(l.in(l.call.zt_more, n)),
          g(l.in_pooled(l.call.g, n)),
          gt(l.in_pooled(l.call.gt, n)),
          gt_more(l.in_pooled(l.call.gt_more, n)),
          stats(l.stats(n)) {}

    template <typename V, int kPixels>
    SELMATCH_HD void read(const BlockChannel<V>& channel, const BlockCell& cell, int c, BlockParameters<V>* parameters,
                          BlockPoint<V>* point, Slopes<V>* slopes) const {
      BlockCurve<V> curve[kPixels];
      V weight[kPixels];
      loops.template points<V, kPixels, kDual>(channel, z, zt, zt_more, cell, c, parameters, point);
      for (int k = 0; k < kPixels; ++k) {
        curve[k] = loops.activation(point[k].n);
      }
      loops.template pool_weights<V, kPixels>(curve, point, weight);
      const V down = loops.template load_out<V>(g, nullptr, cell, c);
      const V down_t = kDual ? loops.template load_out<V>(gt, gt_more, cell, c) : V{};
      for (int k = 0; k < kPixels; ++k) {
        const V share = weight[k] * down;
        slopes[k] = {curve[k].first * share, curve[k].first * (weight[k] * down_t)};
        if constexpr (Activation::kIsCurved) {
          slopes[k].at += curve[k].second * point[k].nt * share;
        }
      }
    }
  };

  // Sums over an image of a, a zh, at and at zh + a zht; per_pixel, of q, q zh, qt and qt zh + q zht.
  template <bool kDual>
  struct Cotangents {
    Reader<kDual> reader;
    T* total;  // (4, channels)

    template <typename V, int kPixels>
    SELMATCH_HD void at(const BlockCell& cell, int c) {
      const BlockLoops& loops = reader.loops;
      BlockParameters<V> p[kPixels];
      BlockPoint<V> point[kPixels];
      Slopes<V> slopes[kPixels];
      const auto channel = loops.template load_channel<V, kDual>(reader.stats, c);
      reader.template read<V, kPixels>(channel, cell, c, p, point, slopes);
      V sum[4] = {};
      for (int k = 0; k < kPixels; ++k) {
        V a = slopes[k].a, at = slopes[k].at;
        if (loops.call.per_pixel) {
          at = kDual ? p[k].gamma_t * a + p[k].gamma * at : at;
          a = p[k].gamma * a;
        }
        sum[0] += a;
        sum[1] += a * point[k].zh;
        if (kDual) {
          sum[2] += at;
          sum[3] += at * point[k].zh + a * point[k].zht;
        }
      }
      for (int i = 0; i < (kDual ? 4 : 2); ++i) {
        add(total + i * loops.channels + c, sum[i]);
      }
    }
  };

  template <bool kDual>
  void cotangents(int64_t n, T* run) const {
    const int count = kDual ? 4 : 2;
    T* total = sums(n);
    std::fill_n(total, 4 * channels, T(0));
    Cotangents<kDual> kernel = {Reader<kDual>(*this, n), run};
    for (int i = 0; i < out_height; ++i) {
      std::fill_n(run, count * channels, T(0));
      visit_row(kernel, i, false);
      for (int j = 0; j < count * channels; ++j) {
        total[j] += run[j];
      }
    }
  }

  // The means of the norm groups of one row from the images' sums.
  void make_means(int64_t begin, int64_t end) const {
    const int size = call.norm == kBlockBatchNorm ? 1 : channels / call.groups;
    const T *gamma = static_cast<const T*>(call.gamma), *gamma_t = static_cast<const T*>(call.gamma_t);
    const double count = static_cast<double>(pixels) * size * static_cast<double>(end - begin);
    T* to = means(begin);
    for (int first = 0; first < channels; first += size) {
      double sum[4] = {};
      for (int64_t n = begin; n < end; ++n) {
        const T* from = sums(n);
        for (int c = first; c < first + size; ++c) {
          const double a = from[c], az = from[channels + c], at = from[2 * channels + c], azt = from[3 * channels + c];
          const double weight = call.per_pixel ? 1 : gamma[c];
          const double weight_t = call.per_pixel || gamma_t == nullptr ? 0 : gamma_t[c];
          sum[kBlockQ] += weight * a;
          sum[kBlockQz] += weight * az;
          sum[kBlockQt] += weight * at + weight_t * a;
          sum[kBlockQzt] += weight * azt + weight_t * az;
        }
      }
      for (int k = 0; k < kBlockMeans; ++k) {
        std::fill_n(to + k * channels + first, size, static_cast<T>(sum[k] / count));
      }
    }
  }

  template <bool kDual>
  struct Backward {
    Reader<kDual> reader;
    const T* means;
    S *gz, *gzt;

    template <typename V, int kPixels>
    SELMATCH_HD void at(const BlockCell& cell, int c) {
      const BlockLoops& loops = reader.loops;
      const int stride = loops.channels;
      BlockParameters<V> p[kPixels];
      BlockPoint<V> point[kPixels];
      Slopes<V> slopes[kPixels];
      const auto channel = loops.template load_channel<V, kDual>(reader.stats, c);
      reader.template read<V, kPixels>(channel, cell, c, p, point, slopes);
      BlockBackMeans<V> mean = {load<V>(means + c), load<V>(means + stride + c)};
      if (kDual) {
        mean.qt = load<V>(means + 2 * stride + c);
        mean.qzt = load<V>(means + 3 * stride + c);
      }
      for (int k = 0; k < kPixels; ++k) {
        const V q = p[k].gamma * slopes[k].a;
        const V grad = block_gz(channel, mean, point[k].zh, q);
        store(grad, gz + cell.pixel[k] * stride + c);
        if (kDual) {
          const V qt = p[k].gamma_t * slopes[k].a + p[k].gamma * slopes[k].at;
          store(block_gzt(channel, mean, point[k], qt, grad), gzt + cell.pixel[k] * stride + c);
        }
      }
    }
  };

  template <bool kDual>
  void backward(int64_t n) const {
    Backward<kDual> kernel = {Reader<kDual>(*this, n), means(n), out(call.gz, n), kDual ? out(call.gzt, n) : nullptr};
    visit_all(kernel);
  }

  // --- gradients of gamma and beta -----------------------------------------------------------------------------------

  // For each channel: the images' sums, in order.
  template <bool kDual>
  void channel_gradients() const {
    T *gamma = static_cast<T*>(call.gamma_grad), *beta = static_cast<T*>(call.beta_grad);
    const int offset = kDual ? 2 * channels : 0;
    for (int c = 0; c < channels; ++c) {
      double sum = 0, product = 0;
      for (int64_t n = 0; n < call.batch; ++n) {
        sum += sums(n)[offset + c];
        product += sums(n)[offset + channels + c];
      }
      beta[c] = static_cast<T>(sum);
      gamma[c] = static_cast<T>(product);
    }
  }

  // For each pixel and channel, one image after the other.
  template <bool kDual>
  struct PixelGradients {
    Reader<kDual> reader;
    T *gamma, *beta;

    template <typename V, int kPixels>
    SELMATCH_HD void at(const BlockCell& cell, int c) {
      const BlockLoops& loops = reader.loops;
      BlockParameters<V> p[kPixels];
      BlockPoint<V> point[kPixels];
      Slopes<V> slopes[kPixels];
      const auto channel = loops.template load_channel<V, kDual>(reader.stats, c);
      reader.template read<V, kPixels>(channel, cell, c, p, point, slopes);
      for (int k = 0; k < kPixels; ++k) {
        const int64_t at = cell.pixel[k] * loops.channels + c;
        add(beta + at, kDual ? slopes[k].at : slopes[k].a);
        add(gamma + at, kDual ? slopes[k].at * point[k].zh + slopes[k].a * point[k].zht : slopes[k].a * point[k].zh);
      }
    }
  };

  // Rows begin to end - 1 of the output.
  template <bool kDual>
  void pixel_gradients(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t n = 0; n < call.batch; ++n) {
        PixelGradients<kDual> kernel = {Reader<kDual>(*this, n), static_cast<T*>(call.gamma_grad),
                                        static_cast<T*>(call.beta_grad)};
        visit_row(kernel, static_cast<int>(i), false);
      }
    }
  }
};

// --- one pass --------------------------------------------------------------------------------------------------------

template <typename S, typename T, typename Activation, bool kDual>
struct BlockRun {
  const BlockLoops<S, T, Activation> loops;
  const BlockCall& call;
  const CpuParallel parallel;

  template <void (BlockRun::*kStage)(int64_t, int64_t) const>
  void over(int64_t count) const {
    parallel(const_cast<BlockRun*>(this), count,
             [](void* self, int64_t begin, int64_t end) { (static_cast<const BlockRun*>(self)->*kStage)(begin, end); });
  }

  bool batch_norm() const { return call.norm == kBlockBatchNorm; }

  void moments(int64_t begin, int64_t end) const {
    std::vector<T> run(4 * static_cast<size_t>(loops.channels));
    for (int64_t n = end; n-- > begin;) {
      loops.template moments<kDual>(n, run.data());
      if (!batch_norm()) {  // while the image is in the cache
        loops.make_stats(n, n + 1);
        loops.template forward<kDual>(n);
      }
    }
  }

  void apply(int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; ++n) {
      loops.template forward<kDual>(n);
    }
  }

  void forward() const {
    if (call.norm == kBlockNoNorm) {
      loops.make_plain_stats();
      return over<&BlockRun::apply>(call.batch);
    }
    over<&BlockRun::moments>(call.batch);
    if (batch_norm()) {
      loops.make_stats(0, call.batch);
      over<&BlockRun::apply>(call.batch);
    }
  }

  void cotangents(int64_t begin, int64_t end) const {
    std::vector<T> run(4 * static_cast<size_t>(loops.channels));
    for (int64_t n = end; n-- > begin;) {
      loops.template cotangents<kDual>(n, run.data());
      if (!batch_norm()) {
        loops.make_means(n, n + 1);
        loops.template backward<kDual>(n);
      }
    }
  }

  void apply_backward(int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; ++n) {
      loops.template backward<kDual>(n);
    }
  }

  void pixel_gradients(int64_t begin, int64_t end) const { loops.template pixel_gradients<kDual>(begin, end); }

  void backward() const {
    if (call.norm == kBlockNoNorm) {
      std::fill_n(loops.means(0), kBlockMeans * loops.channels, T(0));
      return over<&BlockRun::apply_backward>(call.batch);
    }
    over<&BlockRun::cotangents>(call.batch);
    if (batch_norm()) {
      loops.make_means(0, call.batch);
      over<&BlockRun::apply_backward>(call.batch);
    }
    if (!call.per_pixel) {
      return loops.template channel_gradients<kDual>();
    }
    const int64_t size = loops.pixels * loops.channels;
    std::fill_n(static_cast<T*>(call.gamma_grad), size, T(0));
    std::fill_n(static_cast<T*>(call.beta_grad), size, T(0));
    over<&BlockRun::pixel_gradients>(loops.out_height);
  }
};

template <typename S, typename T, typename Activation>
void run_pass(const BlockCall& call, int pass, CpuParallel parallel) {
  const BlockLoops<S, T, Activation> loops(call);
  switch (pass) {
    case kBlockForward:
      return BlockRun<S, T, Activation, false>{loops, call, parallel}.forward();
    case kBlockBackward:
      return BlockRun<S, T, Activation, false>{loops, call, parallel}.backward();
    case kBlockDualForward:
      return BlockRun<S, T, Activation, true>{loops, call, parallel}.forward();
    default:
      return BlockRun<S, T, Activation, true>{loops, call, parallel}.backward();
  }
}

template <typename S, typename T>
void run(const BlockCall& call, int pass, CpuParallel parallel) {
  if (call.activation == kBlockPiecewise) {
    return run_pass<S, T, PiecewiseActivation<T>>(call, pass, parallel);
  }
  run_pass<S, T, SmoothActivation<T>>(call, pass, parallel);
}
