// The CPU loops of DSA. dsa_cpu_loops.cpp includes this once for each set of vector instructions, in a namespace of its
// own, so there is no include guard; SELMATCH_LANES is the bytes of a vector: 16, 32 (AVX2) or 64 (AVX-512). An
// image is C planes of H x W, small enough to stay in the first caches from operation to operation.

template <typename T>
struct Vectors {
  typedef T lanes __attribute__((vector_size(SELMATCH_LANES), aligned(sizeof(T))));
  typedef int bits __attribute__((vector_size(SELMATCH_LANES), aligned(sizeof(T)), may_alias));
  typedef T pixel __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T))));  // 4 channels of one pixel
};

template <typename T>
struct Loops {
  using Lanes = typename Vectors<T>::lanes;
  using Pixel = typename Vectors<T>::pixel;
  static constexpr int kLanes = SELMATCH_LANES / sizeof(T);

  const DsaCall& call;
  DsaScratch<T>& scratch;
  const int channels, height, width;
  const int64_t plane;

  Loops(const DsaCall& call_, DsaScratch<T>& scratch_)
      : call(call_),
        scratch(scratch_),
        channels(call_.channels),
        height(call_.height),
        width(call_.width),
        plane(static_cast<int64_t>(call_.height) * call_.width) {}

  static const Lanes& lanes(const T* p) { return *reinterpret_cast<const Lanes*>(p); }
  static Lanes& lanes(T* p) { return *reinterpret_cast<Lanes*>(p); }

  // --- in and out ----------------------------------------------------------------------------------------------------

  template <typename S>
  void load(const S* x, T* dst) const {
    const int64_t* stride = call.x_strides;
    for (int c = 0; c < channels; ++c) {
      for (int i = 0; i < height; ++i) {
        const S* from = x + c * stride[1] + i * stride[2];
        T* to = dst + c * plane + static_cast<int64_t>(i) * width;
        for (int j = 0; j < width; ++j) {
          to[j] = static_cast<T>(widen(from[j * stride[3]]));
        }
      }
    }
  }

  template <typename S>
  void store(const T* src, S* y) const {
    const int64_t* stride = call.y_strides;
    for (int c = 0; c < channels; ++c) {
      for (int i = 0; i < height; ++i) {
        const T* from = src + c * plane + static_cast<int64_t>(i) * width;
        S* to = y + c * stride[1] + i * stride[2];
        for (int j = 0; j < width; ++j) {
          narrow(from[j], to + j * stride[3]);
        }
      }
    }
  }

  // The image y past the caches, and `next`, the image that comes after src's, into them meanwhile. Whole lines.
  void store_streamed(const T* src, T* y, const T* next) const {
    constexpr int kLine = 64 / sizeof(T);
    for (int64_t p = 0, end = channels * plane; p < end; p += kLine) {
      __builtin_prefetch(next + p);
      for (int64_t k = p; k < p + kLine; k += 16 / sizeof(T)) {
        stream(src + k, y + k);
      }
    }
  }

  // --- color --------------------------------------------------------------------------------------------------------

  // Fills scratch.sums with each pixel's sum over the channels, and returns the sum of them all.
  T channel_sums(const T* src) const {
    constexpr int64_t kBlock = 64 * kLanes;  // added up in T, the blocks in double
    T* sums = scratch.sums;
    double total = 0;
    for (int64_t begin = 0; begin < plane; begin += kBlock) {
      const int64_t end = begin + kBlock < plane ? begin + kBlock : plane;
      int64_t p = begin;
      Lanes partial = {};
      for (; p + kLanes <= end; p += kLanes) {
        Lanes sum = lanes(src + p);
        for (int c = 1; c < channels; ++c) {
          sum += lanes(src + c * plane + p);
        }
        lanes(sums + p) = sum;
        partial += sum;
      }
      for (int k = 0; k < kLanes; ++k) {
        total += partial[k];
      }
      for (; p < end; ++p) {
        T sum = src[p];
        for (int c = 1; c < channels; ++c) {
          sum += src[c * plane + p];
        }
        sums[p] = sum;
        total += sum;
      }
    }
    return static_cast<T>(total);
  }

  void color(const DsaStep<T>& step, const T* src, T* dst) const {
    const T constant = step.f[2] * channel_sums(src) + step.f[3];
    const T *sums = scratch.sums, gain = step.f[0], share = step.f[1];
    for (int c = 0; c < channels; ++c) {
      int64_t p = 0;
      const T* from = src + c * plane;
      T* to = dst + c * plane;
      for (; p + kLanes <= plane; p += kLanes) {
        lanes(to + p) = gain * lanes(from + p) + (share * lanes(sums + p) + constant);
      }
      for (; p < plane; ++p) {
        to[p] = gain * from[p] + (share * sums[p] + constant);
      }
    }
  }

  // --- moves ---------------------------------------------------------------------------------------------------------

  static void copy(const T* src, T* dst, int64_t count) { std::memcpy(dst, src, count * sizeof(T)); }

  // Without the barriers compilers make this a call of memset, which costs more than the few numbers of a row.
  static void clear(T* dst, int64_t count) {
    int64_t p = 0;
    for (; p + kLanes <= count; p += kLanes) {
      lanes(dst + p) = Lanes{};
      asm volatile("" ::: "memory");
    }
    for (; p < count; ++p) {
      dst[p] = 0;
      asm volatile("" ::: "memory");
    }
  }

  // Every number is written once: calls for parts of rows, or lines written again, cost as much as all the copying.
  void box(const DsaStep<T>& step, const T* src, T* dst) const {
    T *all = scratch.row, *outside = all + width;
    std::memset(all, 0xff, 2 * width * sizeof(T));
    std::memset(outside + step.i[2], 0, (step.i[3] - step.i[2]) * sizeof(T));
    for (int c = 0; c < channels; ++c) {
      for (int i = 0; i < height; ++i, src += width, dst += width) {
        copy_where(i < step.i[0] || i >= step.i[1] ? all : outside, src, dst);
      }
    }
  }

  // A row, with zeros where `keep` has no bits.
  void copy_where(const T* keep, const T* src, T* dst) const {
    using Bits = typename Vectors<T>::bits;
    int j = 0;
    for (; j + kLanes <= width; j += kLanes) {
      *reinterpret_cast<Bits*>(dst + j) =
          *reinterpret_cast<const Bits*>(src + j) & *reinterpret_cast<const Bits*>(keep + j);
    }
    for (; j < width; ++j) {
      dst[j] = keep[j] == T(0) ? T(0) : src[j];  // all bits are a NaN
    }
  }

  // Row by row, as the box; a row that would be read from beyond the image's memory is copied.
  void shift(const DsaStep<T>& step, const T* src, T* dst) const {
    const int down = step.i[0], right = step.i[1];
    const int left = right < 0 ? -right : 0, columns = width - (right < 0 ? -right : right);
    T* inside = scratch.row;
    std::memset(inside, 0, width * sizeof(T));
    std::memset(inside + left, 0xff, columns * sizeof(T));
    for (int c = 0; c < channels; ++c) {
      for (int i = 0; i < height; ++i, dst += width) {
        const int row = i + down;
        const int64_t from = c * plane + static_cast<int64_t>(row) * width + right;
        if (row < 0 || row >= height) {
          clear(dst, width);
        } else if (from < 0 || from + width > channels * plane) {
          clear(dst, width);
          copy(src + from + left, dst + left, columns);
        } else {
          copy_where(inside, src + from, dst);
        }
      }
    }
  }

  void flip(const T* src, T* dst) const {
    const int64_t rows = static_cast<int64_t>(channels) * height;
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = src + row * width + width - 1;
      T* to = dst + row * width;
      for (int j = 0; j < width; ++j) {
        to[j] = from[-j];
      }
    }
  }

  // --- affine, separable (rotation and shear 0): a band matrix along the rows and one along the columns --------------

  // Result q is the sum of weight * in[index] over used[q] taps. Sampling takes two neighbors; one off the line weighs
  // nothing.
  static void make_sampling_taps(T slope, T offset, int size, DsaTaps<T>* taps) {
    int* __restrict used = taps->used, * __restrict left = taps->index, * __restrict right = left + taps->stride;
    T* __restrict left_weight = taps->weight, * __restrict right_weight = left_weight + taps->stride;
    const T beyond = static_cast<T>(size);
    for (int q = 0; q < size; ++q) {
      T at = slope * static_cast<T>(q) + offset;
      at = at > T(-1) ? at : T(-1);
      at = at < beyond ? at : beyond;
      const int low = static_cast<int>(at + T(1)) - 1;
      const T part = at - static_cast<T>(low);
      used[q] = 2;
      left[q] = low < 0 ? 0 : low < size ? low : size - 1;
      right[q] = low + 1 < size ? low + 1 : size - 1;
      left_weight[q] = low >= 0 && low < size ? T(1) - part : T(0);
      right_weight[q] = low + 1 < size ? part : T(0);
    }
    taps->count = 2;
  }

  // The transpose: output j, which sampled between two neighbors, is a tap of both. False where one gets more than
  // kDsaMaxTaps.
  static bool make_scattering_taps(T slope, T offset, int size, DsaTaps<T>* taps) {
    int* __restrict used = taps->used, * __restrict index = taps->index;
    T* __restrict weight = taps->weight;
    const int stride = taps->stride;
    int count = 2;
    for (int q = 0; q < size; ++q) {
      used[q] = 0;
    }
    for (int j = 0; j < size; ++j) {
      const T at = slope * static_cast<T>(j) + offset;
      if (!(at > T(-1) && at < static_cast<T>(size))) {
        continue;
      }
      const int floor = static_cast<int>(at + T(1)) - 1;
      const int low = floor < size ? floor : size - 1;  // the sum rounds: the last number below 32 gives 33
      const T part = at - static_cast<T>(low);
      for (int side = low < 0; side < (low + 1 < size ? 2 : 1); ++side) {
        const int out = low + side, k = used[out]++;
        if (k == kDsaMaxTaps) {
          return false;
        }
        index[k * stride + out] = j;
        weight[k * stride + out] = side == 0 ? T(1) - part : part;
        count = k < count ? count : k + 1;
      }
    }
    count = count <= 3 ? count : kDsaMaxTaps;
    for (int q = 0; q < size; ++q) {
      for (int k = used[q]; k < count; ++k) {
        index[k * stride + q] = 0;
        weight[k * stride + q] = 0;
      }
    }
    taps->count = count;
    return true;
  }

  template <int kCount>
  static void blend_columns(const DsaTaps<T>& taps, const T* src, int rows, int size, T* __restrict dst) {
    const int* __restrict index = taps.index;
    const T* __restrict weight = taps.weight;
    const int stride = taps.stride;
    for (int i = 0; i < rows; ++i, src += size, dst += size) {
      for (int j = 0; j < size; ++j) {
        T sum = weight[j] * src[index[j]];
        for (int k = 1; k < kCount; ++k) {
          sum += weight[k * stride + j] * src[index[k * stride + j]];
        }
        dst[j] = sum;
      }
    }
  }

#if SELMATCH_LANES == 64
  // 16 results in a row come out of a window of 32 pixels, by one permutation a tap; false where that is too narrow.
  static bool make_windows(DsaTaps<float>* taps, int size) {
    int* __restrict window = taps->window, * __restrict index = taps->index;
    const int* __restrict used = taps->used;
    const int stride = taps->stride;
    for (int begin = 0; begin < size; begin += 16) {
      const int end = begin + 16 < size ? begin + 16 : size;
      int low = size, high = 0;
      for (int j = begin; j < end; ++j) {
        for (int k = 0; k < used[j]; ++k) {
          low = index[k * stride + j] < low ? index[k * stride + j] : low;
          high = index[k * stride + j] > high ? index[k * stride + j] : high;
        }
      }
      if (high - low >= 32) {
        return false;
      }
      window[begin / 16] = low;
    }
    for (int k = 0; k < taps->count; ++k) {
      for (int j = 0; j < size; ++j) {
        index[k * stride + j] -= window[j / 16];
      }
    }
    return true;
  }

  template <int kCount>
  static void permute_columns(const DsaTaps<float>& taps, const float* src, int rows, int size, float* dst) {
    const int stride = taps.stride;
    for (int begin = 0; begin < size; begin += 16) {
      const int low = taps.window[begin / 16], ahead = size - low, count = size - begin;
      const __mmask16 first = ahead >= 16 ? 0xffff : (1u << ahead) - 1;
      const __mmask16 second = ahead >= 32 ? 0xffff : ahead > 16 ? (1u << (ahead - 16)) - 1 : 0;
      const __mmask16 out = count >= 16 ? 0xffff : (1u << count) - 1;
      __m512i index[kCount];
      __m512 weight[kCount];
      for (int k = 0; k < kCount; ++k) {
        index[k] = _mm512_loadu_si512(taps.index + k * stride + begin);
        weight[k] = _mm512_maskz_loadu_ps(out, taps.weight + k * stride + begin);
      }
      for (int i = 0; i < rows; ++i) {
        const float* from = src + static_cast<int64_t>(i) * size + low;
        const __m512 a = _mm512_maskz_loadu_ps(first, from), b = _mm512_maskz_loadu_ps(second, from + 16);
        __m512 sum = _mm512_mul_ps(weight[0], _mm512_permutex2var_ps(a, index[0], b));
        for (int k = 1; k < kCount; ++k) {
          sum = _mm512_fmadd_ps(weight[k], _mm512_permutex2var_ps(a, index[k], b), sum);
        }
        _mm512_mask_storeu_ps(dst + static_cast<int64_t>(i) * size + begin, out, sum);
      }
    }
  }
#endif

  template <int kCount>
  static void blend_columns_as_fits(DsaTaps<T>* taps, const T* src, int rows, int size, T* dst) {
#if SELMATCH_LANES == 64
    if constexpr (sizeof(T) == sizeof(float)) {
      if (make_windows(taps, size)) {
        return permute_columns<kCount>(*taps, src, rows, size, dst);
      }
    }
#endif
    blend_columns<kCount>(*taps, src, rows, size, dst);
  }

  // One row out of up to kDsaMaxTaps others.
  static void blend_row(const DsaTaps<T>& taps, int i, const T* src, int size, T* __restrict dst) {
    const int used = taps.used[i], stride = taps.stride;
    const T* row[kDsaMaxTaps] = {};
    T weight[kDsaMaxTaps] = {};
    for (int k = 0; k < used; ++k) {
      row[k] = src + static_cast<int64_t>(taps.index[k * stride + i]) * size;
      weight[k] = taps.weight[k * stride + i];
    }
    const T *a = row[0], *b = row[1], *c = row[2], u = weight[0], v = weight[1], w = weight[2];
    if (used == 2) {
      for (int j = 0; j < size; ++j) {
        dst[j] = u * a[j] + v * b[j];
      }
    } else if (used == 3) {
      for (int j = 0; j < size; ++j) {
        dst[j] = u * a[j] + v * b[j] + w * c[j];
      }
    } else {
      clear(dst, size);
      for (int k = 0; k < used; ++k) {
        for (int j = 0; j < size; ++j) {
          dst[j] += weight[k] * row[k][j];
        }
      }
    }
  }

  bool separable(const DsaStep<T>& step, const T* src, T* dst) const {
    if (step.f[1] != T(0) || step.f[3] != T(0)) {
      return false;
    }
    DsaTaps<T>&across = scratch.across, &along = scratch.along;
    if (!step.turn) {
      make_sampling_taps(step.f[0], step.f[2], width, &across);
      make_sampling_taps(step.f[4], step.f[5], height, &along);
    } else if (!make_scattering_taps(step.f[0], step.f[2], width, &across) ||
               !make_scattering_taps(step.f[4], step.f[5], height, &along)) {
      return false;
    }
    T* narrowed = scratch.image;
    const int rows = channels * height;
    if (across.count == 2) {
      blend_columns_as_fits<2>(&across, src, rows, width, narrowed);
    } else if (across.count == 3) {
      blend_columns_as_fits<3>(&across, src, rows, width, narrowed);
    } else {
      blend_columns_as_fits<kDsaMaxTaps>(&across, src, rows, width, narrowed);
    }
    for (int c = 0; c < channels; ++c) {
      for (int i = 0; i < height; ++i) {
        blend_row(along, i, narrowed + c * plane, width, dst + c * plane + static_cast<int64_t>(i) * width);
      }
    }
    return true;
  }

  // --- affine, any: 4 channels of a pixel side by side, in a grid with a border of zeros -----------------------------

  int grid_width() const { return width + 3; }

  // For output row i: which grid pixel is the upper left of the four sampled, and the weights of its right and lower
  // neighbors. Positions off the image are moved onto the border.
  void place_row(const DsaStep<T>& step, int i) const {
    int* __restrict index = scratch.index;
    T* __restrict right = scratch.right, * __restrict down = scratch.down;
    const T across = step.f[0], along = step.f[3];
    const T column0 = step.f[1] * static_cast<T>(i) + step.f[2] + T(1), last_column = static_cast<T>(width + 1);
    const T row0 = step.f[4] * static_cast<T>(i) + step.f[5] + T(1), last_row = static_cast<T>(height + 1);
    const int stride = grid_width(), count = width;
    for (int j = 0; j < count; ++j) {
      T column = across * static_cast<T>(j) + column0, row = along * static_cast<T>(j) + row0;
      column = column > T(0) ? column : T(0);
      column = column < last_column ? column : last_column;
      row = row > T(0) ? row : T(0);
      row = row < last_row ? row : last_row;
      const int whole_column = static_cast<int>(column), whole_row = static_cast<int>(row);
      index[j] = whole_row * stride + whole_column;
      right[j] = column - static_cast<T>(whole_column);
      down[j] = row - static_cast<T>(whole_row);
    }
  }

  // Up to four planes side by side; planes that are missing read as the first one.
  void pack_row(const T* src, int count, Pixel* __restrict out) const {
    const T *a = src, *b = src + (count > 1 ? plane : 0), *c = src + (count > 2 ? 2 * plane : 0),
            *d = src + (count > 3 ? 3 * plane : 0);
    int j = 0;
#if SELMATCH_LANES == 64
    if constexpr (sizeof(T) == sizeof(float)) {
      for (; j + 16 <= width; j += 16) {
        pack16(a + j, b + j, c + j, d + j, reinterpret_cast<float*>(out + j));
      }
    }
#endif
    for (const int end = width; j < end; ++j) {
      out[j] = Pixel{a[j], b[j], c[j], d[j]};
    }
  }

  void unpack_row(const Pixel* in, int count, T* dst) const {
    const T* __restrict from = reinterpret_cast<const T*>(in);
    int begin = 0;
#if SELMATCH_LANES == 64
    if constexpr (sizeof(T) == sizeof(float)) {
      for (; begin + 16 <= width; begin += 16) {
        unpack16(from + 4 * begin, count, plane, dst + begin);
      }
    }
#endif
    for (int c = 0; c < count; ++c) {
      T* __restrict to = dst + c * plane;
      for (int j = begin, end = width; j < end; ++j) {
        to[j] = from[4 * j + c];
      }
    }
  }

#if SELMATCH_LANES == 64
  // 16 pixels: transposes of 4 x 4 in each quarter of a vector. After them, quarter q of vector k is pixel 4 q + k.
  // (Masks of ones, since without a mask GCC 12 warns about its own header.)
  static void pack16(const float* a, const float* b, const float* c, const float* d, float* out) {
    constexpr __mmask8 kAll = 0xff;
    const __m512 va = _mm512_loadu_ps(a), vb = _mm512_loadu_ps(b), vc = _mm512_loadu_ps(c), vd = _mm512_loadu_ps(d);
    const __m512d ab_low = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(0xffff, va, vb));
    const __m512d ab_high = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(0xffff, va, vb));
    const __m512d cd_low = _mm512_castps_pd(_mm512_maskz_unpacklo_ps(0xffff, vc, vd));
    const __m512d cd_high = _mm512_castps_pd(_mm512_maskz_unpackhi_ps(0xffff, vc, vd));
    const __m512 pixels[4] = {_mm512_castpd_ps(_mm512_maskz_unpacklo_pd(kAll, ab_low, cd_low)),
                              _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(kAll, ab_low, cd_low)),
                              _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(kAll, ab_high, cd_high)),
                              _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(kAll, ab_high, cd_high))};
    for (int k = 0; k < 4; ++k) {
      _mm_storeu_ps(out + 4 * k, _mm512_maskz_extractf32x4_ps(kAll, pixels[k], 0));
      _mm_storeu_ps(out + 16 + 4 * k, _mm512_maskz_extractf32x4_ps(kAll, pixels[k], 1));
      _mm_storeu_ps(out + 32 + 4 * k, _mm512_maskz_extractf32x4_ps(kAll, pixels[k], 2));
      _mm_storeu_ps(out + 48 + 4 * k, _mm512_maskz_extractf32x4_ps(kAll, pixels[k], 3));
    }
  }

  // The way back: two permutations a channel pick every fourth value, of pixels 0 to 7 and of 8 to 15.
  static void unpack16(const float* in, int count, int64_t plane, float* dst) {
    const __m512 v0 = _mm512_loadu_ps(in), v1 = _mm512_loadu_ps(in + 16), v2 = _mm512_loadu_ps(in + 32),
                 v3 = _mm512_loadu_ps(in + 48);
    __m512i pick = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    for (int c = 0; c < count; ++c) {
      const __m512 first = _mm512_permutex2var_ps(v0, pick, v1), second = _mm512_permutex2var_ps(v2, pick, v3);
      _mm512_storeu_ps(dst + c * plane, _mm512_mask_blend_ps(0xff00, first, second));
      pick = _mm512_add_epi32(pick, _mm512_set1_epi32(1));
    }
  }
#endif

  void sample_row(int stride, const Pixel* grid, Pixel* __restrict line) const {
    const int* __restrict index = scratch.index;
    const T* __restrict right_part = scratch.right, * __restrict down_part = scratch.down;
    for (int j = 0, end = width; j < end; ++j) {
      const Pixel* at = grid + index[j];
      const T right = right_part[j], down = down_part[j];
      const Pixel left_side = at[0] + down * (at[stride] - at[0]);
      const Pixel right_side = at[1] + down * (at[stride + 1] - at[1]);
      line[j] = left_side + right * (right_side - left_side);
    }
  }

  void sample(const DsaStep<T>& step, const T* src, int count, T* dst) const {
    Pixel* grid = reinterpret_cast<Pixel*>(static_cast<T*>(scratch.grid));
    Pixel* line = reinterpret_cast<Pixel*>(static_cast<T*>(scratch.row));
    const int stride = grid_width();
    const int64_t line_size = 4 * static_cast<int64_t>(stride);
    clear(scratch.grid, line_size + 4);
    for (int i = 0; i < height; ++i) {
      Pixel* to = grid + static_cast<int64_t>(i + 1) * stride + 1;
      pack_row(src + static_cast<int64_t>(i) * width, count, to);
      clear(reinterpret_cast<T*>(to + width), 12);  // the border right of this row and left of the next
    }
    clear(scratch.grid + line_size * (height + 1) + 4, 2 * line_size - 4);
    for (int i = 0; i < height; ++i) {
      place_row(step, i);
      sample_row(stride, grid, line);
      unpack_row(line, count, dst + static_cast<int64_t>(i) * width);
    }
  }

  void scatter_row(int stride, const Pixel* __restrict line, Pixel* grid) const {
    const int* __restrict index = scratch.index;
    const T* __restrict right_part = scratch.right, * __restrict down_part = scratch.down;
    for (int j = 0, end = width; j < end; ++j) {
      Pixel* at = grid + index[j];
      const T right = right_part[j], down = down_part[j];
      const Pixel right_side = right * line[j], left_side = line[j] - right_side;
      at[0] += left_side - down * left_side;
      at[1] += right_side - down * right_side;
      at[stride] += down * left_side;
      at[stride + 1] += down * right_side;
    }
  }

  void scatter(const DsaStep<T>& step, const T* src, int count, T* dst) const {
    Pixel* grid = reinterpret_cast<Pixel*>(static_cast<T*>(scratch.grid));
    Pixel* line = reinterpret_cast<Pixel*>(static_cast<T*>(scratch.row));
    const int stride = grid_width();
    clear(scratch.grid, static_cast<int64_t>(4) * stride * (height + 3));
    for (int i = 0; i < height; ++i) {
      place_row(step, i);
      pack_row(src + static_cast<int64_t>(i) * width, count, line);
      scatter_row(stride, line, grid);
    }
    for (int i = 0; i < height; ++i) {
      unpack_row(grid + static_cast<int64_t>(i + 1) * stride + 1, count, dst + static_cast<int64_t>(i) * width);
    }
  }

  void affine(const DsaStep<T>& step, const T* src, T* dst) const {
    if (separable(step, src, dst)) {
      return;
    }
    for (int c = 0; c < channels; c += 4) {
      const int count = channels - c < 4 ? channels - c : 4;
      if (step.turn) {
        scatter(step, src + c * plane, count, dst + c * plane);
      } else {
        sample(step, src + c * plane, count, dst + c * plane);
      }
    }
  }

  // --- one image -----------------------------------------------------------------------------------------------------

  void apply(const DsaStep<T>& step, const T* src, T* dst) const {
    switch (step.op) {
      case kDsaColor:
        return color(step, src, dst);
      case kDsaShift:
        return shift(step, src, dst);
      case kDsaBox:
        return box(step, src, dst);
      case kDsaFlip:
        return flip(src, dst);
      default:
        return affine(step, src, dst);
    }
  }

  // The image's operations that change anything, in the order they are applied.
  int plan(int64_t image) const {
    int count = 0;
    for (int64_t k = 0; k < call.length; ++k) {
      const int64_t index = call.mode == kDsaTranspose ? call.length - 1 - k : k;
      const DsaStep<T> step = dsa_step<T>(call, image, index);
      if (step.op != kDsaNone) {
        scratch.steps[count++] = step;
      }
    }
    return count;
  }

  // The last operation writes into y where that is planar and not to be streamed.
  template <typename S>
  void image(int64_t n, bool direct_x, bool direct_y, bool streamed) const {
    const int count = plan(n);
    const S* x = static_cast<const S*>(call.x) + n * call.x_strides[0];
    S* y = static_cast<S*>(call.y) + n * call.y_strides[0];
    const T* src = reinterpret_cast<const T*>(x);
    if (!direct_x) {
      load(x, scratch.images[0]);
      src = scratch.images[0];
    }
    for (int k = 0; k < count; ++k) {
      T* dst = src == scratch.images[0] ? scratch.images[1] : scratch.images[0];
      if (direct_y && k + 1 == count) {
        dst = reinterpret_cast<T*>(y);
      }
      apply(scratch.steps[k], src, dst);
      src = dst;
    }
    if (streamed) {
      store_streamed(src, reinterpret_cast<T*>(y), reinterpret_cast<const T*>(x + call.x_strides[0]));
    } else if (!direct_y || count == 0) {
      store(src, y);
    }
  }
};

template <typename S, typename T>
void run_range(const DsaCall& call, DsaScratch<T>& scratch, int64_t begin, int64_t end) {
  const Loops<T> loops(call, scratch);
  const bool direct_x = sizeof(S) == sizeof(T) && dsa_is_planar(call, call.x_strides);
  const bool planar_y = sizeof(S) == sizeof(T) && dsa_is_planar(call, call.y_strides);
  const bool streamed = planar_y && call.streamed && loops.channels * loops.plane * sizeof(T) % 64 == 0;
  for (int64_t n = begin; n < end; ++n) {
    loops.template image<S>(n, direct_x, planar_y && !streamed, streamed);
  }
  if (streamed) {
    stream_end();
  }
}
