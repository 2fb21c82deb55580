// The loops of the 3 x 3 convolution. conv3x3_cpu_loops.cpp includes this once for each set of vector instructions, in
// a namespace of its own, so there is no include guard; SELMATCH_LANES is the bytes of a vector.

template <typename T>
struct Conv3x3Loops {
  typedef T Lanes __attribute__((vector_size(SELMATCH_LANES)));
  static constexpr int kLanes = SELMATCH_LANES / sizeof(T);
  // Of the block of a matrix product that stays in registers, of which AVX-512 has 32 and the others have 16. With 6
  // rows 12 sums are in progress, more than the 8 that hide the time of a multiply-add; what 6 do not divide takes 4.
  static constexpr int kRows = SELMATCH_LANES == 64 ? 8 : 6, kFewRows = 4, kColumns = 2 * kLanes;
  // Done together, their transforms stay in the second cache. A row of the gradient's has a quarter of the parts.
  static constexpr int kTiles = 32, kGradientTiles = 64;

  // Numbers from one of a transform's 16 parts to the next: a cache line more than it holds, since parts a power of two
  // apart would compete for the same lines of the first cache.
  static int64_t part(int channels, int tiles = kTiles) { return int64_t{tiles} * channels + 64 / sizeof(T); }

  static SELMATCH_HD Lanes load(const T* p) {
    Lanes value;
    std::memcpy(&value, p, sizeof(value));
    return value;
  }
  static SELMATCH_HD void store(Lanes value, T* p) { std::memcpy(p, &value, sizeof(value)); }

  // A matrix as a factor on the left, from its first number on.
  struct Rows {
    const T* at;
    int64_t row_stride, depth_stride;
  };

  // out[r][0..kColumns) = (or +=, where kAdd) sum over d of a[r, d] b[d b_stride + 0..kColumns) for r below `rows`, a
  // multiple of kFewRows.
  template <bool kAdd>
  static void multiply(Rows a, int64_t rows, const T* b, int64_t b_stride, int64_t depth, T* out, int64_t out_stride) {
    int64_t many = rows;
    while (many % kRows != 0) {
      many -= kFewRows;
    }
    for (int64_t row = 0; row < rows;) {
      const Rows rest = {a.at + row * a.row_stride, a.row_stride, a.depth_stride};
      T* to = out + row * out_stride;
      if (row < many) {
        multiply_block<kRows, kAdd>(rest, b, b_stride, depth, to, out_stride);
        row += kRows;
      } else {
        multiply_block<kFewRows, kAdd>(rest, b, b_stride, depth, to, out_stride);
        row += kFewRows;
      }
    }
  }

  template <int kBlock, bool kAdd>
  static void multiply_block(Rows a, const T* b, int64_t b_stride, int64_t depth, T* out, int64_t out_stride) {
    Lanes left[kBlock], right[kBlock];
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      left[r] = kAdd ? load(out + r * out_stride) : Lanes{};
      right[r] = kAdd ? load(out + r * out_stride + kLanes) : Lanes{};
    }
    for (int64_t d = 0; d < depth; ++d, a.at += a.depth_stride, b += b_stride) {
      const Lanes b_left = load(b), b_right = load(b + kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) {
        const T value = a.at[r * a.row_stride];
        left[r] += value * b_left;
        right[r] += value * b_right;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
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
  static void transform_input(const Conv3x3Call<T>& call, int64_t begin, int64_t end, const T* zeros, T* to) {
    const int height = call.height, width = call.width, channels = call.channels;
    const int64_t size = static_cast<int64_t>(height) * width * channels, step = part(channels);
    for (int64_t tile = begin; tile < end; ++tile, to += channels) {
      const Place at = place(tile, height, width);
      const T *image = call.x + at.image * size, *from[16];
      for (int k = 0; k < 16; ++k) {
        from[k] = pixel(image, at.row - 1 + k / 4, at.column - 1 + k % 4, height, width, channels, zeros);
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

  // (a, b, c) to G (a, b, c)
  static SELMATCH_HD void weight4(Lanes a, Lanes b, Lanes c, Lanes* to) {
    const Lanes even = (a + c) / 2, odd = b / 2;
    to[0] = a, to[1] = even + odd, to[2] = even - odd, to[3] = c;
  }

  // U = G w G^T of channels begin to end - 1, as panels: (16, outputs / kColumns, channels, kColumns).
  static void transform_weight(const Conv3x3Call<T>& call, int64_t begin, int64_t end, T* to) {
    const int64_t size = static_cast<int64_t>(call.channels) * call.outputs;
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t first = 0; first < call.outputs; first += kLanes) {
        T w[9][kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t k = first + lane;
          const T* from = call.weight + (call.transposed ? c * call.outputs + k : k * call.channels + c) * 9;
          for (int j = 0; j < 9; ++j) {
            w[call.transposed ? 8 - j : j][lane] = from[j];  // the transpose's are turned by 180 degrees
          }
        }
        Lanes half[3][4], u[4];
        for (int j = 0; j < 3; ++j) {
          weight4(load(w[j]), load(w[3 + j]), load(w[6 + j]), half[j]);
        }
        T* panel = to + first / kColumns * call.channels * kColumns + c * kColumns + first % kColumns;
        for (int i = 0; i < 4; ++i) {
          weight4(half[0][i], half[1][i], half[2][i], u);
          for (int j = 0; j < 4; ++j) {
            store(u[j], panel + (4 * i + j) * size);
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
        transform_input(call, first, last, zeros, v);
        const int64_t rows = (last - first + kFewRows - 1) / kFewRows * kFewRows;
        for (int k = 0; k < 16; ++k) {
          products(v + k * part(call.channels), rows, weights + k * static_cast<int64_t>(call.channels) * call.outputs,
                   m + k * part(call.outputs));
        }
        transform_output(call, m, first, last, zeros);
      }
    }

    void products(const T* v, int64_t rows, const T* u, T* m) const {
      for (int column = 0; column < call.outputs; column += kColumns, u += call.channels * kColumns) {
        multiply<false>({v, call.channels, 1}, rows, u, kColumns, call.channels, m + column, call.outputs);
      }
    }

    void run() {
      over<&Forward::transform_weights>(*this, parallel, call.channels);
      over<&Forward::blocks>(*this, parallel, (tiles(call) + kTiles - 1) / kTiles);
    }
  };

  // --- the gradient of the weights -----------------------------------------------------------------------------------

  // A piece of work is one of the four rows of the transforms, for all channels and `side` outputs, over a share of the
  // tiles: its sums stay in the second cache while these tiles are added to them.
  struct Gradient {
    const Conv3x3GradientCall<T>& call;
    const CpuParallel parallel;
    const int channels = call.channels, side = std::gcd(call.outputs, 128), across = call.outputs / side;
    const int64_t blocks = (tiles(call) + kGradientTiles - 1) / kGradientTiles;
    // Shares are added in order: the same bits for any number of threads. Long sums are of several for their rounding.
    const int64_t shares =
        std::clamp<int64_t>(blocks / 4, 1, std::clamp<int64_t>(blocks / 32, std::max(4 / across, 1), 16));
    const int64_t square = static_cast<int64_t>(channels) * side;
    Memory<T> sums{shares * across * 16 * square};  // (shares, across, 16, channels, side)
    Memory<T> zeros{std::max(channels, side), T(0)};

    void pieces(int64_t begin, int64_t end) {
      Memory<T> v{4 * part(channels, kGradientTiles)};
      Memory<T> m{4 * part(side, kGradientTiles)};
      for (int64_t piece = begin; piece < end; ++piece) {
        const int row = static_cast<int>(piece % 4);
        const int64_t share = piece / 4 / across, output = piece / 4 % across * side;
        const int64_t head = blocks * share / shares, tail = blocks * (share + 1) / shares;
        for (int64_t block = head; block < tail; ++block) {
          const int64_t first = block * kGradientTiles, last = std::min(first + kGradientTiles, tiles(call));
          input_row(row, first, last, v);
          gradient_row(row, output, first, last, m);
          for (int k = 0; k < 4; ++k) {
            const T *left = v + k * part(channels, kGradientTiles), *right = m + k * part(side, kGradientTiles);
            T* sum = sums + (4 * piece + k) * square;
            block == head ? products<false>(left, right, last - first, sum)
                          : products<true>(left, right, last - first, sum);
          }
        }
      }
    }

    // Row `row` of B^T d B into to: 4 parts of (tiles, channels).
    void input_row(int row, int64_t begin, int64_t end, T* to) const {
      constexpr int kAbove[] = {0, 1, 2, 1}, kBelow[] = {2, 2, 1, 3};
      const int height = call.height, width = call.width;
      const int64_t size = static_cast<int64_t>(height) * width * channels, step = part(channels, kGradientTiles);
      const T sign = row == 1 ? 1 : -1;
      for (int64_t tile = begin; tile < end; ++tile, to += channels) {
        const Place at = place(tile, height, width);
        const T *image = call.x + at.image * size, *above[4], *below[4];
        for (int k = 0; k < 4; ++k) {
          above[k] = pixel(image, at.row - 1 + kAbove[row], at.column - 1 + k, height, width, channels, zeros);
          below[k] = pixel(image, at.row - 1 + kBelow[row], at.column - 1 + k, height, width, channels, zeros);
        }
        for (int c = 0; c < channels; c += kLanes) {
          Lanes d[4];
          for (int k = 0; k < 4; ++k) {
            d[k] = load(above[k] + c) + sign * load(below[k] + c);
          }
          input4(d[0], d[1], d[2], d[3]);
          for (int k = 0; k < 4; ++k) {
            store(d[k], to + k * step + c);
          }
        }
      }
    }

    // Row `row` of A g A^T into to, from output `output` on: 4 parts of (tiles, side).
    void gradient_row(int row, int64_t output, int64_t begin, int64_t end, T* to) const {
      constexpr T kAbove[] = {1, 1, 1, 0}, kBelow[] = {0, 1, -1, -1};
      const int height = call.height, width = call.width, outputs = call.outputs;
      const int64_t size = static_cast<int64_t>(height) * width * outputs, step = part(side, kGradientTiles);
      for (int64_t tile = begin; tile < end; ++tile, to += side) {
        const Place at = place(tile, height, width);
        const T *image = call.g + at.image * size + output, *from[4];
        for (int k = 0; k < 4; ++k) {
          from[k] = pixel(image, at.row + k / 2, at.column + k % 2, height, width, outputs, zeros);
        }
        for (int c = 0; c < side; c += kLanes) {
          const Lanes left = kAbove[row] * load(from[0] + c) + kBelow[row] * load(from[2] + c);
          const Lanes right = kAbove[row] * load(from[1] + c) + kBelow[row] * load(from[3] + c);
          store(left, to + c);
          store(left + right, to + step + c);
          store(left - right, to + 2 * step + c);
          store(-right, to + 3 * step + c);
        }
      }
    }

    template <bool kAdd>
    void products(const T* v, const T* m, int64_t depth, T* sum) const {
      for (int column = 0; column < side; column += kColumns) {
        multiply<kAdd>({v, 1, channels}, channels, m + column, side, depth, sum + column, side);
      }
    }

    // G^T [.] G of channels begin to end - 1
    void finish(int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t output = 0; output < call.outputs; output += kLanes) {
          Lanes u[16] = {};
          for (int64_t share = 0; share < shares; ++share) {
            const T* sum = sums + (share * across + output / side) * 16 * square + c * side + output % side;
            for (int j = 0; j < 16; ++j) {
              u[j] += load(sum + j * square);
            }
          }
          store_weight(u, call.weight + (output * channels + c) * 9);
        }
      }
    }

    // Of kLanes outputs, channels * 9 numbers apart.
    void store_weight(const Lanes* u, T* w) const {
      Lanes half[3][4], result[9];
      for (int j = 0; j < 4; ++j) {
        const Lanes even = (u[4 + j] + u[8 + j]) / 2, odd = (u[4 + j] - u[8 + j]) / 2;
        half[0][j] = u[j] + even, half[1][j] = odd, half[2][j] = even + u[12 + j];
      }
      for (int i = 0; i < 3; ++i) {
        const Lanes even = (half[i][1] + half[i][2]) / 2, odd = (half[i][1] - half[i][2]) / 2;
        result[3 * i] = half[i][0] + even, result[3 * i + 1] = odd, result[3 * i + 2] = even + half[i][3];
      }
      for (int lane = 0; lane < kLanes; ++lane, w += static_cast<int64_t>(channels) * 9) {
        for (int i = 0; i < 9; ++i) {
          w[i] = result[i][lane];
        }
      }
    }

    void run() {
      over<&Gradient::pieces>(*this, parallel, shares * across * 4);
      over<&Gradient::finish>(*this, parallel, channels);
    }
  };

  template <auto kStage, typename Work>
  static void over(Work& work, CpuParallel parallel, int64_t count) {
    parallel(&work, count,
             [](void* self, int64_t begin, int64_t end) { (static_cast<Work*>(self)->*kStage)(begin, end); });
  }
};

#include "conv3x3/conv3x3_few_cpu_loops.h"

template <typename T>
void run(const Conv3x3Call<T>& call, CpuParallel parallel) {
  const int channels = call.transposed ? call.outputs : call.channels;  // of the input
  if (channels <= kConv3x3Few) {
    return run_few<T>(call, channels, parallel);
  }
  typename Conv3x3Loops<T>::Forward{call, parallel}.run();
}

template <typename T>
void run(const Conv3x3GradientCall<T>& call, CpuParallel parallel) {
  if (call.channels <= kConv3x3Few) {
    return run_few<T>(call, call.channels, parallel);
  }
  typename Conv3x3Loops<T>::Gradient{call, parallel}.run();
}
