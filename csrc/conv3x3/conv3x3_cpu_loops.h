// The loops of the 3 x 3 convolution. conv3x3_cpu_loops.cpp includes this once for each set of vector instructions, in
// a namespace of its own, so there is no include guard; SELMATCH_LANES is the bytes of a vector.

#include "cpu_products_loops.h"

// The convolution in tiles of kTile x kTile results, 2 or 4.
template <typename T, int kTile>
struct Conv3x3Tiles : CpuProducts<T> {
  using Products = CpuProducts<T>;
  using Lanes = typename Products::Lanes;
  using Products::kColumns, Products::kFewRows, Products::kLanes, Products::kRows;
  using Products::load, Products::multiply, Products::store;

  static constexpr int kSide = kTile + 2, kParts = kSide * kSide;  // of a transform
  // Tiles whose transforms fit the second cache, in the convolution and in the gradient of the weights.
  static constexpr int kTogether = (kTile == 4 ? 2 : 4) * kRows, kGradientTiles = 32;
  static constexpr int kChunk = kTile == 4 ? 16 : 64;  // of a sum over channels; see multiply

  // --- transforms ----------------------------------------------------------------------------------------------------

  // The points of the transforms' rows; that of the last row is infinity. With 1 and 2 in place of 5/8 and 3/2 the
  // results would round twice as much.
  static constexpr T kPoint[] = {0, T(kTile == 2 ? 1 : 0.625), T(kTile == 2 ? -1 : -0.625), 1.5, -1.5};
  static constexpr T square(int row) { return kPoint[row] * kPoint[row]; }
  static constexpr T other_square(int row) { return square(row < 3 ? 3 : 1); }
  static constexpr T kProduct = kTile == 2 ? 1 : square(1) * square(3), kSum = square(1) + square(3);
  // Of G's rows but the first and the last: 1 over the product of the point's distances to the others.
  static constexpr T scale(int row) {
    return 1 / (2 * square(row) * (kTile == 2 ? 1 : square(row) - other_square(row)));
  }

  // Row kRow of B^T d. load(k): d_k
  template <int kRow, typename Load>
  static SELMATCH_HD Lanes input_row(const Load& load) {
    constexpr bool kEnd = kRow == 0 || kRow == kSide - 1;
    if constexpr (kTile == 2 && kEnd) {
      return load(kRow) - load(kRow == 0 ? 2 : 1);
    } else if constexpr (kTile == 2) {
      return load(2) + kPoint[kRow] * load(1);
    } else if constexpr (kEnd) {
      constexpr int k = kRow == 0 ? 0 : 1;
      return kProduct * load(k) - kSum * load(k + 2) + load(k + 4);
    } else {
      constexpr T other = other_square(kRow);
      return (load(4) - other * load(2)) + kPoint[kRow] * (load(3) - other * load(1));
    }
  }

  // Row kRow of A g. load(k): g_k
  template <int kRow, typename Load>
  static SELMATCH_HD Lanes gradient_row(const Load& load) {
    if constexpr (kRow == 0 || kRow == kSide - 1) {
      return load(kRow == 0 ? 0 : kTile - 1);
    } else if constexpr (kTile == 2) {
      return load(0) + kPoint[kRow] * load(1);
    } else {
      return (load(0) + square(kRow) * load(2)) + kPoint[kRow] * (load(1) + square(kRow) * load(3));
    }
  }

  // Row kRow of G w. load(k): w_k
  template <int kRow, typename Load>
  static SELMATCH_HD Lanes weight_row(const Load& load) {
    if constexpr (kRow == 0) {
      return load(0) / kProduct;
    } else if constexpr (kRow == kSide - 1) {
      return load(2);
    } else {
      return ((load(0) + square(kRow) * load(2)) + kPoint[kRow] * load(1)) * scale(kRow);
    }
  }

  // A^T m, to[0..kTile)
  template <typename Load>
  static SELMATCH_HD void output(const Load& load, Lanes* to) {
    const Lanes even = load(1) + load(2), odd = load(1) - load(2);
    if constexpr (kTile == 2) {
      to[0] = load(0) + even;
      to[1] = odd + load(3);
    } else {
      constexpr T a = kPoint[1], b = kPoint[3];
      const Lanes even_b = load(3) + load(4), odd_a = a * odd, odd_b = b * (load(3) - load(4));
      to[0] = load(0) + even + even_b;
      to[1] = odd_a + odd_b;
      to[2] = a * a * even + b * b * even_b;
      to[3] = a * a * odd_a + b * b * odd_b + load(5);
    }
  }

  // G^T s, to[0..3)
  template <typename Load>
  static SELMATCH_HD void weight(const Load& load, Lanes* to) {
    const Lanes even = scale(1) * (load(1) + load(2)), odd = scale(1) * (load(1) - load(2));
    to[0] = load(0) / kProduct + even;
    to[1] = kPoint[1] * odd;
    to[2] = square(1) * even + load(kSide - 1);
    if constexpr (kTile == 4) {
      const Lanes even_b = scale(3) * (load(3) + load(4)), odd_b = scale(3) * (load(3) - load(4));
      to[0] += even_b;
      to[1] += kPoint[3] * odd_b;
      to[2] += square(3) * even_b;
    }
  }

  // call(row) for each row of a transform, known when it is compiled.
  template <typename Call>
  static SELMATCH_HD void each_row(const Call& call) {
    each_of(call, std::make_integer_sequence<int, kSide>());
  }
  template <typename Call, int... kRow>
  static SELMATCH_HD void each_of(const Call& call, std::integer_sequence<int, kRow...>) {
    (call(std::integral_constant<int, kRow>()), ...);
  }

  // A cache line more than `count` numbers: lines a power of two apart would compete for the same places in the first
  // cache.
  static constexpr int64_t padded(int64_t count) { return count + 64 / sizeof(T); }
  // Numbers from one part to the next, of V, of U and of their products.
  static int64_t v_part(int channels) { return padded(int64_t{kTogether} * channels); }
  static int64_t u_part(int channels) { return padded(int64_t{kColumns} * channels); }
  static constexpr int64_t kMPart = padded(kTogether * kColumns);

  template <typename Call>
  static int64_t tiles(const Call& call) {
    return call.batch * ((call.height + kTile - 1) / kTile) * ((call.width + kTile - 1) / kTile);
  }

  // Tile `tile` of all images: its image, and the first row and column of its results.
  struct Place {
    int64_t image;
    int row, column;
  };
  static Place place(int64_t tile, int height, int width) {
    const int64_t across = (width + kTile - 1) / kTile, each = across * ((height + kTile - 1) / kTile);
    const int64_t rest = tile % each;
    return {tile / each, static_cast<int>(kTile * (rest / across)), static_cast<int>(kTile * (rest % across))};
  }

  // The pixel at (row, column) of an image, zeros outside.
  static const T* pixel(const T* image, int row, int column, int height, int width, int channels, const T* zeros) {
    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
    return inside ? image + (static_cast<int64_t>(row) * width + column) * channels : zeros;
  }

  // V = B^T d B of tiles begin to end - 1 of x into to: kParts parts of (kTogether, channels).
  static void transform_input(const Conv3x3Call<T>& call, const T* x, int64_t begin, int64_t end, const T* zeros,
                              T* to) {
    const int height = call.height, width = call.width, channels = call.channels;
    const int64_t size = static_cast<int64_t>(height) * width * channels, step = v_part(channels);
    for (int64_t tile = begin; tile < end; ++tile, to += channels) {
      const Place at = place(tile, height, width);
      const T *image = x + at.image * size, *from[kParts];
      for (int k = 0; k < kParts; ++k) {
        from[k] = pixel(image, at.row - 1 + k / kSide, at.column - 1 + k % kSide, height, width, channels, zeros);
      }
      for (int c = 0; c < channels; c += kLanes) {
        Lanes half[kParts];
#pragma GCC unroll 6
        for (int j = 0; j < kSide; ++j) {
          Lanes d[kSide];
#pragma GCC unroll 6
          for (int i = 0; i < kSide; ++i) {
            d[i] = load(from[kSide * i + j] + c);
          }
          each_row([&](auto row) { half[kSide * row + j] = input_row<row>([&](int i) { return d[i]; }); });
        }
#pragma GCC unroll 6
        for (int i = 0; i < kSide; ++i) {
          each_row([&](auto row) {
            store(input_row<row>([&](int j) { return half[kSide * i + j]; }), to + (kSide * i + row) * step + c);
          });
        }
      }
    }
    for (int64_t tile = end; (tile - begin) % kFewRows != 0; ++tile, to += channels) {  // a product takes whole blocks
      for (int k = 0; k < kParts; ++k) {
        std::fill_n(to + k * step, channels, T(0));
      }
    }
  }

  // y = A^T M A (+ bias) of tiles begin to end - 1 and outputs column to column + kColumns - 1, from the products m:
  // kParts parts of (kTogether, kColumns).
  static void transform_output(const Conv3x3Call<T>& call, const T* m, int64_t begin, int64_t end, int64_t column,
                               const T* bias, T* y) {
    const int outputs = call.outputs;
    const int64_t size = static_cast<int64_t>(call.height) * call.width * outputs, step = kMPart;
    for (int64_t tile = begin; tile < end; ++tile, m += kColumns) {
      const Place at = place(tile, call.height, call.width);
      T* first = y + at.image * size + (static_cast<int64_t>(at.row) * call.width + at.column) * outputs + column;
      const int below = std::min(call.height - at.row, kTile), beside = std::min(call.width - at.column, kTile);
      for (int c = 0; c < kColumns; c += kLanes) {
        Lanes half[kTile * kSide], to[kTile];
#pragma GCC unroll 6
        for (int j = 0; j < kSide; ++j) {
          output([&](int i) { return load(m + (kSide * i + j) * step + c); }, to);
#pragma GCC unroll 4
          for (int i = 0; i < kTile; ++i) {
            half[kSide * i + j] = to[i];
          }
        }
        const Lanes offset = bias == nullptr ? Lanes{} : load(bias + column + c);
        for (int i = 0; i < below; ++i) {
          output([&](int j) { return half[kSide * i + j]; }, to);
          T* row = first + static_cast<int64_t>(i) * call.width * outputs + c;
#pragma GCC unroll 4
          for (int j = 0; j < kTile; ++j) {
            if (j < beside) {
              store(to[j] + offset, row + j * outputs);
            }
          }
        }
      }
    }
  }

  // U = G w G^T of the outputs of panel `panel`: (kParts, channels, kColumns), of which channels begin to end - 1.
  static void transform_weight(const Conv3x3Call<T>& call, const T* weight, int64_t panel, int64_t begin, int64_t end,
                               T* to) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t column = 0; column < kColumns; column += kLanes) {
        T w[9][kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          const int64_t k = panel * kColumns + column + lane;
          const T* from = weight + (call.transposed ? c * call.outputs + k : k * call.channels + c) * 9;
          for (int j = 0; j < 9; ++j) {
            w[call.transposed ? 8 - j : j][lane] = from[j];  // the transpose's are turned by 180 degrees
          }
        }
        Lanes half[3 * kSide];
        for (int j = 0; j < 3; ++j) {
          each_row([&](auto row) { half[3 * row + j] = weight_row<row>([&](int i) { return load(w[3 * i + j]); }); });
        }
        T* u = to + c * kColumns + column;
        for (int i = 0; i < kSide; ++i) {
          each_row([&](auto row) {
            store(weight_row<row>([&](int j) { return half[3 * i + j]; }),
                  u + (kSide * i + row) * u_part(call.channels));
          });
        }
      }
    }
  }

  // --- the convolution -----------------------------------------------------------------------------------------------

  // A block is kTogether tiles, a panel kColumns outputs. The smaller of all V and all U is computed first and the
  // other one block by block, or panel by panel. Tangents come after what they are tangents of: the V of a block, then
  // V of x_t; the U of a panel, then U of weight_t.
  struct Forward {
    const Conv3x3Call<T>& call;
    const CpuParallel parallel;
    const int channels = call.channels;
    const int64_t blocks = (tiles(call) + kTogether - 1) / kTogether, panels = call.outputs / kColumns;
    const int64_t v_one = kParts * v_part(channels), u_one = kParts * u_part(channels);
    const int64_t v_size = call.x_t == nullptr ? v_one : 2 * v_one, u_size = call.y_t == nullptr ? u_one : 2 * u_one;
    const bool weights_first = tiles(call) >= call.outputs;
    Memory<T> first{weights_first ? panels * u_size : blocks * v_size};
    Memory<T> zeros{channels, T(0)};

    void input(int64_t block, T* v) {
      const int64_t begin = block * kTogether, end = std::min(begin + kTogether, tiles(call));
      transform_input(call, call.x, begin, end, zeros, v);
      if (call.x_t != nullptr) {
        transform_input(call, call.x_t, begin, end, zeros, v + v_one);
      }
    }

    void weight(int64_t panel, int64_t begin, int64_t end, T* u) {
      transform_weight(call, call.weight, panel, begin, end, u);
      if (call.y_t != nullptr) {
        transform_weight(call, call.weight_t, panel, begin, end, u + u_one);
      }
    }

    void all_inputs(int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        input(block, first + block * v_size);
      }
    }

    // A piece is kConv3x3Multiple channels of a panel.
    void all_weights(int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t panel = piece % panels, channel = piece / panels * kConv3x3Multiple;
        weight(panel, channel, channel + kConv3x3Multiple, first + panel * u_size);
      }
    }

    void over_blocks(int64_t begin, int64_t end) {
      Memory<T> v{v_size}, m{kParts * kMPart};
      for (int64_t block = begin; block < end; ++block) {
        input(block, v);
        for (int64_t panel = 0; panel < panels; ++panel) {
          results(block, panel, v, first + panel * u_size, m);
        }
      }
    }

    void over_panels(int64_t begin, int64_t end) {
      Memory<T> u{u_size}, m{kParts * kMPart};
      for (int64_t panel = begin; panel < end; ++panel) {
        weight(panel, 0, channels, u);
        for (int64_t block = 0; block < blocks; ++block) {
          results(block, panel, first + block * v_size, u, m);
        }
      }
    }

    void results(int64_t block, int64_t panel, const T* v, const T* u, T* m) {
      const int64_t begin = block * kTogether, end = std::min(begin + kTogether, tiles(call)),
                    column = panel * kColumns;
      if (call.y != nullptr) {
        products(end - begin, v, u, m, false);
        transform_output(call, m, begin, end, column, call.bias, call.y);
      }
      if (call.y_t != nullptr) {
        products(end - begin, v, u + u_one, m, false);
        if (call.x_t != nullptr) {
          products(end - begin, v + v_one, u, m, true);
        }
        transform_output(call, m, begin, end, column, call.bias_t, call.y_t);
      }
    }

    void products(int64_t count, const T* v, const T* u, T* m, bool add) {
      const int64_t rows = (count + kFewRows - 1) / kFewRows * kFewRows;
      for (int k = 0; k < kParts; ++k, v += v_part(channels), u += u_part(channels), m += kMPart) {
        multiply({v, channels, 1}, rows, u, kColumns, channels, m, kColumns, add, kChunk, u_part(channels));
      }
    }

    void run() {
      if (weights_first) {
        Products::template over<&Forward::all_weights>(*this, parallel, panels * (channels / kConv3x3Multiple));
        Products::template over<&Forward::over_blocks>(*this, parallel, blocks);
      } else {
        Products::template over<&Forward::all_inputs>(*this, parallel, blocks);
        Products::template over<&Forward::over_panels>(*this, parallel, panels);
      }
    }
  };

  // --- the gradient of the weights -----------------------------------------------------------------------------------

  // A piece of work is one of the rows of the transforms, for all channels and `side` outputs, over a share of the
  // tiles.
  struct Gradient {
    const Conv3x3GradientCall<T>& call;
    const CpuParallel parallel;
    const int channels = call.channels, side = std::gcd(call.outputs, 128), across = call.outputs / side;
    const int64_t blocks = (tiles(call) + kGradientTiles - 1) / kGradientTiles;
    // Shares are added in order: the same bits for any number of threads. Long sums are of several for their rounding.
    const int64_t shares =
        std::clamp<int64_t>(blocks / 4, 1, std::clamp<int64_t>(blocks / 32, std::max(4 / across, 1), 256 / kParts));
    const int64_t square = padded(static_cast<int64_t>(channels) * side);
    Memory<T> sums{shares * across * kParts * square};  // (shares, across, kParts, side / kColumns, channels, kColumns)
    Memory<T> zeros{std::max(channels, side), T(0)};

    int64_t v_part() const { return kGradientTiles * padded(channels); }
    int64_t m_part() const { return padded(int64_t{kGradientTiles} * side); }

    // Pieces begin to end - 1. Those of the same tiles take turns, block by block: x and g are in the second cache
    // still.
    void pieces(int64_t begin, int64_t end) {
      Memory<T> v{kSide * v_part()};
      Memory<T> m{kSide * m_part()};
      for (int64_t next; begin < end; begin = next) {
        next = std::min(end, (begin / kSide + 1) * kSide);
        const int64_t share = begin / kSide / across, head = blocks * share / shares;
        for (int64_t block = head; block < blocks * (share + 1) / shares; ++block) {
          for (int64_t piece = begin; piece < next; ++piece) {
            each_row([&](auto row) {
              if (piece % kSide == row) {
                add_block<row>(piece, block, block > head, v, m);
              }
            });
          }
        }
      }
    }

    template <int kRow>
    void add_block(int64_t piece, int64_t block, bool add, T* v, T* m) {
      const int64_t output = piece / kSide % across * side;
      const int64_t first = block * kGradientTiles, count = std::min<int64_t>(kGradientTiles, tiles(call) - first);
      transform_input_row<kRow>(first, first + count, v);
      transform_gradient_row<kRow>(output, first, first + count, m);
      for (int k = 0; k < kSide; ++k) {
        T* sum = sums + (kSide * piece + k) * square;
        for (int64_t column = 0; column < side; column += kColumns) {
          multiply({v + k * v_part(), 1, padded(channels)}, channels, m + k * m_part() + column * kGradientTiles,
                   kColumns, count, sum + column * channels, kColumns, add);
        }
      }
    }

    // Row kRow of B^T d B into to: kSide parts of (kGradientTiles, padded(channels)).
    template <int kRow>
    void transform_input_row(int64_t begin, int64_t end, T* to) const {
      const int height = call.height, width = call.width;
      const int64_t size = static_cast<int64_t>(height) * width * channels;
      for (int64_t tile = begin; tile < end; ++tile, to += padded(channels)) {
        const Place at = place(tile, height, width);
        const T *image = call.x + at.image * size, *from[kParts];
        for (int k = 0; k < kParts; ++k) {
          from[k] = pixel(image, at.row - 1 + k / kSide, at.column - 1 + k % kSide, height, width, channels, zeros);
        }
        for (int c = 0; c < channels; c += kLanes) {
          Lanes half[kSide];
#pragma GCC unroll 6
          for (int j = 0; j < kSide; ++j) {
            half[j] = input_row<kRow>([&](int i) { return load(from[kSide * i + j] + c); });
          }
          each_row([&](auto row) { store(input_row<row>([&](int j) { return half[j]; }), to + row * v_part() + c); });
        }
      }
    }

    // Row kRow of A g A^T into to, from output `output` on: kSide parts of (side / kColumns, kGradientTiles, kColumns).
    template <int kRow>
    void transform_gradient_row(int64_t output, int64_t begin, int64_t end, T* to) const {
      const int height = call.height, width = call.width, outputs = call.outputs;
      const int64_t size = static_cast<int64_t>(height) * width * outputs;
      for (int64_t tile = begin; tile < end; ++tile, to += kColumns) {
        const Place at = place(tile, height, width);
        const T *image = call.g + at.image * size + output, *from[kTile * kTile];
        for (int k = 0; k < kTile * kTile; ++k) {
          from[k] = pixel(image, at.row + k / kTile, at.column + k % kTile, height, width, outputs, zeros);
        }
        for (int c = 0; c < side; c += kLanes) {
          Lanes half[kTile];
#pragma GCC unroll 4
          for (int j = 0; j < kTile; ++j) {
            half[j] = gradient_row<kRow>([&](int i) { return load(from[kTile * i + j] + c); });
          }
          T* panel = to + c / kColumns * kGradientTiles * kColumns + c % kColumns;
          each_row([&](auto row) { store(gradient_row<row>([&](int j) { return half[j]; }), panel + row * m_part()); });
        }
      }
    }

    // G^T [.] G of outputs kLanes begin to kLanes end - 1
    void finish(int64_t begin, int64_t end) {
      for (int64_t output = begin * kLanes; output < end * kLanes; output += kLanes) {
        const int64_t column = output % side;
        const T* group =
            sums + output / side * kParts * square + column / kColumns * kColumns * channels + column % kColumns;
        for (int64_t c = 0; c < channels; ++c) {
          Lanes u[kParts] = {};
          for (int64_t share = 0; share < shares; ++share) {
            const T* sum = group + share * across * kParts * square + c * kColumns;
            for (int j = 0; j < kParts; ++j) {
              u[j] += load(sum + j * square);
            }
          }
          store_weight(u, call.weight + (output * channels + c) * 9);
        }
      }
    }

    // Of kLanes outputs, channels * 9 numbers apart.
    void store_weight(const Lanes* u, T* w) const {
      Lanes half[3 * kSide], result[9], to[3];
      for (int j = 0; j < kSide; ++j) {
        weight([&](int i) { return u[kSide * i + j]; }, to);
        for (int i = 0; i < 3; ++i) {
          half[kSide * i + j] = to[i];
        }
      }
      for (int i = 0; i < 3; ++i) {
        weight([&](int j) { return half[kSide * i + j]; }, result + 3 * i);
      }
      for (int lane = 0; lane < kLanes; ++lane, w += static_cast<int64_t>(channels) * 9) {
        for (int i = 0; i < 9; ++i) {
          w[i] = result[i][lane];
        }
      }
    }

    void run() {
      Products::template over<&Gradient::pieces>(*this, parallel, shares * across * kSide);
      Products::template over<&Gradient::finish>(*this, parallel, call.outputs / kLanes);
    }
  };
};

#include "conv3x3/conv3x3_few_cpu_loops.h"

// Whether tiles of 4 x 4 serve a sum of `sum` products: it has to be long (conv3x3.h), and they have to take fewer
// products than tiles of 2 x 2, which they do not where they reach beyond a small map.
inline bool use_large_tiles(int height, int width, int64_t sum) {
  const auto products = [&](int tile) {
    return (tile + 2) * (tile + 2) * ((height + tile - 1) / tile) * ((width + tile - 1) / tile);
  };
  return sum >= kConv3x3LongSum && products(4) < products(2);
}

template <typename T>
void run(const Conv3x3Call<T>& call, CpuParallel parallel) {
  const int channels = call.transposed ? call.outputs : call.channels;  // of the input
  if (channels <= kConv3x3Few) {
    return run_few<T>(call, channels, parallel);
  }
  if (use_large_tiles(call.height, call.width, 9 * call.channels)) {
    return typename Conv3x3Tiles<T, 4>::Forward{call, parallel}.run();
  }
  typename Conv3x3Tiles<T, 2>::Forward{call, parallel}.run();
}

template <typename T>
void run(const Conv3x3GradientCall<T>& call, CpuParallel parallel) {
  if (call.channels <= kConv3x3Few) {
    return run_few<T>(call, call.channels, parallel);
  }
  if (use_large_tiles(call.height, call.width, call.batch * call.height * call.width)) {
    return typename Conv3x3Tiles<T, 4>::Gradient{call, parallel}.run();
  }
  typename Conv3x3Tiles<T, 2>::Gradient{call, parallel}.run();
}
