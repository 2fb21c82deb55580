// The loops of the 3 x 3 convolution. conv3x3_cpu_loops.cpp includes this once for each set of vector instructions, in
// a namespace of its own, so there is no include guard; SELMATCH_LANES is the bytes of a vector.

template <typename T>
struct Conv3x3Loops {
  typedef T Lanes __attribute__((vector_size(SELMATCH_LANES)));
  static constexpr int kLanes = SELMATCH_LANES / sizeof(T);
  // Of the block of a matrix product that stays in registers, of which AVX-512 has 32 and the others have 16.
  static constexpr int kRows = SELMATCH_LANES == 64 ? 8 : 4, kColumns = 2 * kLanes;
  static constexpr int kTiles = 32;  // done together: their transforms stay in the second cache

  // Numbers from one of a transform's 16 parts to the next: a cache line more than it holds, since parts a power of two
  // apart would compete for the same lines of the first cache.
  static int64_t part(int channels) { return int64_t{kTiles} * channels + 64 / sizeof(T); }

  static SELMATCH_HD Lanes load(const T* p) {
    Lanes value;
    std::memcpy(&value, p, sizeof(value));
    return value;
  }
  static SELMATCH_HD void store(Lanes value, T* p) { std::memcpy(p, &value, sizeof(value)); }

  // out[r][0..kColumns) = (or +=, where kAdd) sum over d of a[r row_stride + d depth_stride] b[d b_stride +
  // 0..kColumns)
  template <bool kAdd>
  static void multiply(const T* a, int64_t row_stride, int64_t depth_stride, const T* b, int64_t b_stride,
                       int64_t depth, T* out, int64_t out_stride) {
    Lanes left[kRows], right[kRows];
    for (int r = 0; r < kRows; ++r) {
      left[r] = kAdd ? load(out + r * out_stride) : Lanes{};
      right[r] = kAdd ? load(out + r * out_stride + kLanes) : Lanes{};
    }
    for (int64_t d = 0; d < depth; ++d, a += depth_stride, b += b_stride) {
      const Lanes b_left = load(b), b_right = load(b + kLanes);
      for (int r = 0; r < kRows; ++r) {
        const T value = a[r * row_stride];
        left[r] += value * b_left;
        right[r] += value * b_right;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store(left[r], out + r * out_stride);
      store(right[r], out + r * out_stride + kLanes);
    }
  }

  // --- transforms ----------------------------------------------------------------------------------------------------

  // (B^T d B): of 4 values in place, applied to rows and then to columns.
  static SELMATCH_HD void input4(Lanes& a, Lanes& b, Lanes& c, Lanes& d) {
    const Lanes first = a - c, second = b + c, third = c - b, fourth = b - d;
    a = first, b = second, c = third, d = fourth;
  }

  template <typename Call>
  static int64_t tiles(const Call& call) {
    return call.batch * ((call.height + 1) / 2) * ((call.width + 1) / 2);
  }

  // Tile `tile` of all images: its image, and the first row and column of its results.
  struct Place {
    int64_t image;
    int row, column;
  };
  static Place place(int64_t tile, int height, int width) {
    const int64_t across = (width + 1) / 2, each = across * ((height + 1) / 2);
    const int64_t rest = tile % each;
    return {tile / each, static_cast<int>(2 * (rest / across)), static_cast<int>(2 * (rest % across))};
  }

  // The pixel at (row, column) of an image, zeros outside.
  static const T* pixel(const T* image, int row, int column, int height, int width, int channels, const T* zeros) {
    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
    return inside ? image + (static_cast<int64_t>(row) * width + column) * channels : zeros;
  }

  // V = B^T d B of tiles begin to end - 1 into to: 16 parts of (kTiles, channels).
  static void transform_input(const T* x, int64_t begin, int64_t end, int height, int width, int channels,
                              const T* zeros, T* to) {
    const int64_t size = static_cast<int64_t>(height) * width * channels, step = part(channels);
    for (int64_t tile = begin; tile < end; ++tile, to += channels) {
      const Place at = place(tile, height, width);
      const T* from[16];
      for (int k = 0; k < 16; ++k) {
        from[k] = pixel(x + at.image * size, at.row - 1 + k / 4, at.column - 1 + k % 4, height, width, channels, zeros);
      }
      for (int c = 0; c < channels; c += kLanes) {
        Lanes d[16];
        for (int k = 0; k < 16; ++k) {
          d[k] = load(from[k] + c);
        }
        for (int k = 0; k < 4; ++k) {
          input4(d[k], d[4 + k], d[8 + k], d[12 + k]);
        }
        for (int k = 0; k < 16; k += 4) {
          input4(d[k], d[k + 1], d[k + 2], d[k + 3]);
        }
        for (int k = 0; k < 16; ++k) {
          store(d[k], to + k * step + c);
        }
      }
    }
  }

  // y = A^T M A (+ bias) of the tiles' products m: 16 parts of (kTiles, outputs).
  static void transform_output(const Conv3x3Call<T>& call, const T* m, int64_t begin, int64_t end, const T* zeros) {
    const int outputs = call.outputs;
    const int64_t size = static_cast<int64_t>(call.height) * call.width * outputs, step = part(outputs);
    const T* bias = call.bias == nullptr ? zeros : call.bias;
    for (int64_t tile = begin; tile < end; ++tile, m += outputs) {
      const Place at = place(tile, call.height, call.width);
      T* y = call.y + at.image * size + (static_cast<int64_t>(at.row) * call.width + at.column) * outputs;
      const bool below = at.row + 1 < call.height, beside = at.column + 1 < call.width;
      for (int c = 0; c < outputs; c += kLanes) {
        Lanes top[4], bottom[4];
        for (int k = 0; k < 4; ++k) {
          const T* p = m + k * step + c;
          const Lanes a = load(p), b = load(p + 4 * step), d = load(p + 8 * step), e = load(p + 12 * step);
          top[k] = a + b + d;
          bottom[k] = b - d - e;
        }
        const Lanes offset = load(bias + c);
        store(top[0] + top[1] + top[2] + offset, y + c);
        if (beside) {
          store(top[1] - top[2] - top[3] + offset, y + outputs + c);
        }
        if (below) {
          T* next = y + static_cast<int64_t>(call.width) * outputs;
          store(bottom[0] + bottom[1] + bottom[2] + offset, next + c);
          if (beside) {
            store(bottom[1] - bottom[2] - bottom[3] + offset, next + outputs + c);
          }
        }
      }
    }
  }

  // A g A^T of tiles begin to end - 1 into to: 16 parts of (kTiles, outputs).
  static void transform_gradient(const Conv3x3GradientCall<T>& call, int64_t begin, int64_t end, const T* zeros,
                                 T* to) {
    const int outputs = call.outputs, height = call.height, width = call.width;
    const int64_t size = static_cast<int64_t>(height) * width * outputs, step = part(outputs);
    for (int64_t tile = begin; tile < end; ++tile, to += outputs) {
      const Place at = place(tile, height, width);
      const T* from[4];
      for (int k = 0; k < 4; ++k) {
        from[k] = pixel(call.g + at.image * size, at.row + k / 2, at.column + k % 2, height, width, outputs, zeros);
      }
      for (int c = 0; c < outputs; c += kLanes) {
        Lanes rows[4][2];
        for (int k = 0; k < 2; ++k) {
          const Lanes upper = load(from[k] + c), lower = load(from[2 + k] + c);
          rows[0][k] = upper, rows[1][k] = upper + lower, rows[2][k] = upper - lower, rows[3][k] = -lower;
        }
        for (int r = 0; r < 4; ++r) {
          T* p = to + 4 * r * step + c;
          store(rows[r][0], p);
          store(rows[r][0] + rows[r][1], p + step);
          store(rows[r][0] - rows[r][1], p + 2 * step);
          store(-rows[r][1], p + 3 * step);
        }
      }
    }
  }

  // U = G w G^T of output columns begin to end - 1, as panels: (16, outputs / kColumns, channels, kColumns).
  static void transform_weight(const Conv3x3Call<T>& call, int64_t begin, int64_t end, T* to) {
    for (int64_t k = begin; k < end; ++k) {
      T* column = to + k / kColumns * call.channels * kColumns + k % kColumns;
      for (int c = 0; c < call.channels; ++c) {
        const T* w = call.weight + (call.transposed ? c * call.outputs + k : k * call.channels + c) * 9;
        T half[4][3];
        for (int j = 0; j < 3; ++j) {
          T a = w[j], b = w[3 + j], d = w[6 + j];
          if (call.transposed) {  // turned by 180 degrees
            a = w[8 - j], b = w[5 - j], d = w[2 - j];
          }
          half[0][j] = a, half[1][j] = (a + b + d) / 2, half[2][j] = (a - b + d) / 2, half[3][j] = d;
        }
        for (int i = 0; i < 4; ++i) {
          const T *h = half[i], u[4] = {h[0], (h[0] + h[1] + h[2]) / 2, (h[0] - h[1] + h[2]) / 2, h[2]};
          for (int j = 0; j < 4; ++j) {
            column[(4 * i + j) * static_cast<int64_t>(call.channels) * call.outputs + c * kColumns] = u[j];
          }
        }
      }
    }
  }

  // --- the convolution -----------------------------------------------------------------------------------------------

  struct Forward {
    const Conv3x3Call<T>& call;
    const CpuParallel parallel;
    Memory<T> weights{16 * static_cast<int64_t>(call.channels) * call.outputs};
    Memory<T> zeros{std::max(call.channels, call.outputs), T(0)};

    void transform_weights(int64_t begin, int64_t end) { transform_weight(call, begin, end, weights); }

    void blocks(int64_t begin, int64_t end) {
      Memory<T> v{16 * part(call.channels), T(0)};
      Memory<T> m{16 * part(call.outputs)};
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kTiles, last = std::min(first + kTiles, tiles(call));
        transform_input(call.x, first, last, call.height, call.width, call.channels, zeros, v);
        const int64_t rows = (last - first + kRows - 1) / kRows * kRows;
        for (int k = 0; k < 16; ++k) {
          products(v + k * part(call.channels), rows, weights + k * static_cast<int64_t>(call.channels) * call.outputs,
                   m + k * part(call.outputs));
        }
        transform_output(call, m, first, last, zeros);
      }
    }

    void products(const T* v, int64_t rows, const T* u, T* m) const {
      for (int column = 0; column < call.outputs; column += kColumns, u += call.channels * kColumns) {
        for (int64_t row = 0; row < rows; row += kRows) {
          multiply<false>(v + row * call.channels, call.channels, 1, u, kColumns, call.channels,
                          m + row * call.outputs + column, call.outputs);
        }
      }
    }

    void run() {
      over<&Forward::transform_weights>(*this, parallel, call.outputs);
      over<&Forward::blocks>(*this, parallel, (tiles(call) + kTiles - 1) / kTiles);
    }
  };

  // --- the gradient of the weights -----------------------------------------------------------------------------------

  struct Gradient {
    const Conv3x3GradientCall<T>& call;
    const CpuParallel parallel;
    const int64_t size = static_cast<int64_t>(call.channels) * call.outputs;
    const int64_t blocks = (tiles(call) + kTiles - 1) / kTiles;
    // Sums of their own, added in order: the same bits for any number of threads. Of several blocks each, since a share
    // writes and reads the sums of all pairs of channels once more.
    const int64_t count = std::clamp<int64_t>(blocks / 4, 1, 16);
    Memory<T> sums{count * 16 * size};
    Memory<T> zeros{std::max(call.channels, call.outputs), T(0)};

    void shares(int64_t begin, int64_t end) {
      Memory<T> v{16 * part(call.channels)};
      Memory<T> m{16 * part(call.outputs)};
      for (int64_t share = begin; share < end; ++share) {
        const int64_t head = blocks * share / count, tail = blocks * (share + 1) / count;
        for (int64_t block = head; block < tail; ++block) {
          const int64_t first = block * kTiles, last = std::min(first + kTiles, tiles(call));
          transform_input(call.x, first, last, call.height, call.width, call.channels, zeros, v);
          transform_gradient(call, first, last, zeros, m);
          for (int k = 0; k < 16; ++k) {
            const T *left = v + k * part(call.channels), *right = m + k * part(call.outputs);
            T* sum = sums + (share * 16 + k) * size;
            block == head ? products<false>(left, right, last - first, sum)
                          : products<true>(left, right, last - first, sum);
          }
        }
      }
    }

    template <bool kAdd>
    void products(const T* v, const T* m, int64_t depth, T* sum) const {
      for (int column = 0; column < call.outputs; column += kColumns) {
        for (int c = 0; c < call.channels; c += kRows) {
          multiply<kAdd>(v + c, 1, call.channels, m + column, call.outputs, depth,
                         sum + static_cast<int64_t>(c) * call.outputs + column, call.outputs);
        }
      }
    }

    // G^T [.] G of channels begin to end - 1
    void finish(int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t k = 0; k < call.outputs; ++k) {
          T u[16] = {};
          for (int64_t share = 0; share < count; ++share) {
            for (int j = 0; j < 16; ++j) {
              u[j] += sums[(share * 16 + j) * size + c * call.outputs + k];
            }
          }
          T half[3][4];
          for (int j = 0; j < 4; ++j) {
            const T even = (u[4 + j] + u[8 + j]) / 2, odd = (u[4 + j] - u[8 + j]) / 2;
            half[0][j] = u[j] + even, half[1][j] = odd, half[2][j] = even + u[12 + j];
          }
          T* w = call.weight + (k * call.channels + c) * 9;
          for (int i = 0; i < 3; ++i) {
            const T even = (half[i][1] + half[i][2]) / 2, odd = (half[i][1] - half[i][2]) / 2;
            w[3 * i] = half[i][0] + even, w[3 * i + 1] = odd, w[3 * i + 2] = even + half[i][3];
          }
        }
      }
    }

    void run() {
      over<&Gradient::shares>(*this, parallel, count);
      over<&Gradient::finish>(*this, parallel, call.channels);
    }
  };

  template <auto kStage, typename Work>
  static void over(Work& work, CpuParallel parallel, int64_t count) {
    parallel(&work, count,
             [](void* self, int64_t begin, int64_t end) { (static_cast<Work*>(self)->*kStage)(begin, end); });
  }
};

template <typename T>
void run(const Conv3x3Call<T>& call, CpuParallel parallel) {
  typename Conv3x3Loops<T>::Forward{call, parallel}.run();
}

template <typename T>
void run(const Conv3x3GradientCall<T>& call, CpuParallel parallel) {
  typename Conv3x3Loops<T>::Gradient{call, parallel}.run();
}
