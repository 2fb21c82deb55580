// The CPU loops of DSA. dsa_cpu_loops.cpp includes this once for each set of vector instructions, in a namespace of its
// own, so there is no include guard. An image is C planes of H x W, small enough to stay in the first caches from
// operation to operation. LANES is a vector of 64 bytes, which the compiler splits where the machine's are shorter.

template <typename T>
struct Vectors {
  typedef T lanes __attribute__((vector_size(64), aligned(sizeof(T))));
  typedef T pixel __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T))));  // 4 channels of one pixel
};

template <typename T>
struct Loops {
  using Lanes = typename Vectors<T>::lanes;
  using Pixel = typename Vectors<T>::pixel;
  static constexpr int kLanes = 64 / sizeof(T);

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

  // --- in and out
  // -----------------------------------------------------------------------------------------------------

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

  // --- colour
  // ---------------------------------------------------------------------------------------------------------

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
    T* sums = scratch.sums;
    for (int64_t p = 0; p < plane; ++p) {
      sums[p] = step.f[1] * sums[p] + constant;
    }
    const T gain = step.f[0];
    for (int c = 0; c < channels; ++c) {
      const T* from = src + c * plane;
      T* to = dst + c * plane;
      for (int64_t p = 0; p < plane; ++p) {
        to[p] = gain * from[p] + sums[p];
      }
    }
  }

  // --- moves
  // ----------------------------------------------------------------------------------------------------------

  static void copy(const T* src, T* dst, int64_t count) {
    int64_t p = 0;
    for (; p + kLanes <= count; p += kLanes) {
      lanes(dst + p) = lanes(src + p);
    }
    for (; p < count; ++p) {
      dst[p] = src[p];
    }
  }

  static void clear(T* dst, int64_t count) {
    for (int64_t p = 0; p < count; ++p) {
      dst[p] = 0;
    }
  }

  // A shift moves a plane as one stretch of memory; what wraps around at the rows' ends is cleared after.
  void shift(const DsaStep<T>& step, const T* src, T* dst) const {
    const int down = step.i[0], right = step.i[1];
    const int row0 = down < 0 ? -down : 0, row1 = down > 0 ? height - down : height;
    const int left = right < 0 ? -right : 0, end = right > 0 ? width - right : width;
    const bool empty = row0 >= row1 || left >= end;
    for (int c = 0; c < channels; ++c) {
      T* to = dst + c * plane;
      if (empty) {
        clear(to, plane);
        continue;
      }
      const int64_t first = static_cast<int64_t>(row0) * width + left;
      const int64_t last = static_cast<int64_t>(row1 - 1) * width + end;
      clear(to, first);
      copy(src + c * plane + static_cast<int64_t>(row0 + down) * width + left + right, to + first, last - first);
      clear(to + last, plane - last);
      for (int i = row0; i + 1 < row1; ++i) {
        clear(to + static_cast<int64_t>(i) * width + end, width - end + left);
      }
    }
  }

  void box(const DsaStep<T>& step, const T* src, T* dst) const {
    copy(src, dst, channels * plane);
    for (int c = 0; c < channels; ++c) {
      for (int i = step.i[0]; i < step.i[1]; ++i) {
        clear(dst + c * plane + static_cast<int64_t>(i) * width + step.i[2], step.i[3] - step.i[2]);
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

  // --- affine, separable (rotation and shear 0): a band matrix along the rows and one along the columns
  // -------------------

  // Writes out position q as the sum of weight * in[index] over count taps; false where more than kDsaMaxTaps are
  // needed. Taps left over point to in[size], which holds 0.
  static bool make_taps(T slope, T offset, int size, bool turn, DsaTaps<T>* taps) {
    int* used = taps->used;
    for (int q = 0; q < size; ++q) {
      used[q] = 0;
    }
    for (int k = 0; k < kDsaMaxTaps * size; ++k) {
      taps->index[k] = size;
      taps->weight[k] = 0;
    }
    taps->count = 1;
    for (int j = 0; j < size; ++j) {
      const T at = slope * static_cast<T>(j) + offset;
      if (!(at > T(-1) && at < static_cast<T>(size))) {
        continue;
      }
      const int low = static_cast<int>(at + T(1)) - 1;
      const T part = at - static_cast<T>(low);
      for (int side = 0; side < 2; ++side) {
        const int q = low + side;
        const T weight = side == 0 ? T(1) - part : part;
        if (q < 0 || q >= size || weight == T(0)) {
          continue;
        }
        const int out = turn ? q : j;
        const int k = used[out]++;
        if (k == kDsaMaxTaps) {
          return false;
        }
        taps->index[k * size + out] = turn ? j : q;
        taps->weight[k * size + out] = weight;
        taps->count = used[out] > taps->count ? used[out] : taps->count;
      }
    }
    return true;
  }

  template <int kCount>
  static void blend_row(const DsaTaps<T>& taps, const T* row, int size, T* dst) {
    for (int j = 0; j < size; ++j) {
      T sum = taps.weight[j] * row[taps.index[j]];
      for (int k = 1; k < kCount; ++k) {
        sum += taps.weight[k * size + j] * row[taps.index[k * size + j]];
      }
      dst[j] = sum;
    }
  }

  static void blend_row(const DsaTaps<T>& taps, const T* row, int size, T* dst) {
    if (taps.count <= 2) {
      blend_row<2>(taps, row, size, dst);
    } else if (taps.count == 3) {
      blend_row<3>(taps, row, size, dst);
    } else {
      blend_row<kDsaMaxTaps>(taps, row, size, dst);
    }
  }

  bool separable(const DsaStep<T>& step, const T* src, T* dst) const {
    if (step.f[1] != T(0) || step.f[3] != T(0)) {
      return false;
    }
    DsaTaps<T>&across = scratch.across, &along = scratch.along;
    if (!make_taps(step.f[0], step.f[2], width, step.turn, &across) ||
        !make_taps(step.f[4], step.f[5], height, step.turn, &along)) {
      return false;
    }
    T* row = scratch.row;
    row[width] = 0;
    for (int c = 0; c < channels; ++c) {
      for (int i = 0; i < height; ++i) {
        T* to = dst + c * plane + static_cast<int64_t>(i) * width;
        if (along.used[i] == 0) {
          clear(to, width);
          continue;
        }
        for (int k = 0; k < along.used[i]; ++k) {
          const T* from = src + c * plane + static_cast<int64_t>(along.index[k * height + i]) * width;
          const T weight = along.weight[k * height + i];
          for (int j = 0; j < width; ++j) {
            row[j] = k == 0 ? weight * from[j] : row[j] + weight * from[j];
          }
        }
        blend_row(across, row, width, to);
      }
    }
    return true;
  }

  // --- affine, any: 4 channels of a pixel side by side, in a grid with a border of zeros
  // --------------------------------

  int grid_width() const { return width + 3; }

  // For output row i: which grid pixel is the upper left of the four sampled, and the weights of its right and lower
  // neighbours. Positions off the image are moved onto the border.
  void place_row(const DsaStep<T>& step, int i, int* index, T* right, T* down) const {
    const T* f = step.f;
    const T column0 = f[1] * static_cast<T>(i) + f[2] + T(1), row0 = f[4] * static_cast<T>(i) + f[5] + T(1);
    const T last_column = static_cast<T>(width + 1), last_row = static_cast<T>(height + 1);
    const int stride = grid_width();
    for (int j = 0; j < width; ++j) {
      T column = f[0] * static_cast<T>(j) + column0, row = f[3] * static_cast<T>(j) + row0;
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
  void pack_row(const T* src, int count, Pixel* out) const {
    const T *a = src, *b = src + (count > 1 ? plane : 0), *c = src + (count > 2 ? 2 * plane : 0),
            *d = src + (count > 3 ? 3 * plane : 0);
    for (int j = 0; j < width; ++j) {
      out[j] = Pixel{a[j], b[j], c[j], d[j]};
    }
  }

  void unpack_row(const Pixel* in, int count, T* dst) const {
    const T* from = reinterpret_cast<const T*>(in);
    for (int c = 0; c < count; ++c) {
      for (int j = 0; j < width; ++j) {
        dst[c * plane + j] = from[4 * j + c];
      }
    }
  }

  void sample(const DsaStep<T>& step, const T* src, int count, T* dst) const {
    Pixel* grid = reinterpret_cast<Pixel*>(static_cast<T*>(scratch.grid));
    Pixel* line = reinterpret_cast<Pixel*>(static_cast<T*>(scratch.row));
    const int stride = grid_width();
    for (int i = 0; i < height; ++i) {
      pack_row(src + static_cast<int64_t>(i) * width, count, grid + static_cast<int64_t>(i + 1) * stride + 1);
    }
    for (int i = 0; i < height; ++i) {
      place_row(step, i, scratch.index, scratch.right, scratch.down);
      for (int j = 0; j < width; ++j) {
        const Pixel* at = grid + scratch.index[j];
        const T right = scratch.right[j], down = scratch.down[j], left = T(1) - right, up = T(1) - down;
        line[j] =
            (left * up) * at[0] + (right * up) * at[1] + (left * down) * at[stride] + (right * down) * at[stride + 1];
      }
      unpack_row(line, count, dst + static_cast<int64_t>(i) * width);
    }
  }

  void scatter(const DsaStep<T>& step, const T* src, int count, T* dst) const {
    Pixel* grid = reinterpret_cast<Pixel*>(static_cast<T*>(scratch.grid));
    Pixel* line = reinterpret_cast<Pixel*>(static_cast<T*>(scratch.row));
    const int stride = grid_width();
    for (int i = 0; i < height; ++i) {
      place_row(step, i, scratch.index, scratch.right, scratch.down);
      pack_row(src + static_cast<int64_t>(i) * width, count, line);
      for (int j = 0; j < width; ++j) {
        Pixel* at = grid + scratch.index[j];
        const T right = scratch.right[j], down = scratch.down[j], left = T(1) - right, up = T(1) - down;
        const Pixel value = line[j];
        at[0] += (left * up) * value;
        at[1] += (right * up) * value;
        at[stride] += (left * down) * value;
        at[stride + 1] += (right * down) * value;
      }
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
      clear(scratch.grid, static_cast<int64_t>(4) * grid_width() * (height + 3));
      if (step.turn) {
        scatter(step, src + c * plane, count, dst + c * plane);
      } else {
        sample(step, src + c * plane, count, dst + c * plane);
      }
    }
  }

  // --- one image
  // ------------------------------------------------------------------------------------------------------

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
      case kDsaAffine:
        return affine(step, src, dst);
      default:
        return copy(src, dst, channels * plane);
    }
  }

  // The image's operations that change anything, in the order they are applied; at least one.
  int plan(int64_t image) const {
    int count = 0;
    for (int64_t k = 0; k < call.length; ++k) {
      const int64_t index = call.mode == kDsaTranspose ? call.length - 1 - k : k;
      const DsaStep<T> step = dsa_step<T>(call, image, index);
      if (step.op != kDsaNone) {
        scratch.steps[count++] = step;
      }
    }
    if (count == 0) {
      scratch.steps[count++].op = kDsaNone;
    }
    return count;
  }

  template <typename S>
  void image(int64_t n, bool direct_x, bool direct_y) const {
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
    if (!direct_y) {
      store(src, y);
    }
  }
};

template <typename S, typename T>
void run_range(const DsaCall& call, DsaScratch<T>& scratch, int64_t begin, int64_t end) {
  const Loops<T> loops(call, scratch);
  const bool direct_x = sizeof(S) == sizeof(T) && dsa_is_planar(call, call.x_strides);
  const bool direct_y = sizeof(S) == sizeof(T) && dsa_is_planar(call, call.y_strides);
  for (int64_t n = begin; n < end; ++n) {
    loops.template image<S>(n, direct_x, direct_y);
  }
}
