// The 3 x 3 convolution of an input of few channels, as images have, and its two gradients: matrix products over
// pixels, since the transforms of conv3x3_cpu_loops.h do not pay for so few numbers a pixel. Included by it, once for
// each set of vector instructions.

// Of numbers that the next products need: these walk through them in strides, which no cache foresees.
template <typename T>
void prefetch(const T* from, int64_t count) {
  for (int64_t k = 0; k < count; k += 64 / sizeof(T)) {
    __builtin_prefetch(from + k);
  }
}

// The 3 x 3 surroundings of pixels, a row of 9 * kChannels numbers for each, as the left factor of a product.
template <typename T, int kChannels>
struct Conv3x3Surroundings {
  const T* x;  // (batch, height, width, kChannels)
  int height, width;

  // Of pixels first to first + count - 1 of all images; `step` numbers from one row to the next.
  void gather(int64_t first, int64_t count, int step, T* to) const {
    int row = static_cast<int>(first / width % height), column = static_cast<int>(first % width);
    for (int64_t p = first; p < first + count; ++p, to += step) {
      for (int i = 0; i < 3; ++i) {
        const T* from = x + (p + static_cast<int64_t>(i - 1) * width - 1) * kChannels;
        T* three = to + 3 * i * kChannels;
        const bool inside = row + i >= 1 && row + i <= height;
        if (inside && column >= 1 && column + 1 < width) {
          std::memcpy(three, from, 3 * kChannels * sizeof(T));
        } else {
          for (int k = 0; k < 3 * kChannels; ++k) {
            const int at = column - 1 + k / kChannels;
            three[k] = inside && at >= 0 && at < width ? from[k] : T(0);
          }
        }
      }
      if (++column == width) {
        column = 0, row = row + 1 == height ? 0 : row + 1;
      }
    }
  }
};

template <typename T, int kChannels>
struct Conv3x3FewForward {
  using Products = CpuProducts<T>;
  static constexpr int kPixels = 24;  // done together: their results stay in the first cache
  static constexpr int kBias = 9 * kChannels, kLength = kBias + 1;  // of the matrix: the last row is the bias

  const Conv3x3Call<T>& call;
  const CpuParallel parallel;
  const int outputs = call.outputs;
  const int64_t pixels = call.batch * call.height * call.width;
  const int64_t size = static_cast<int64_t>(kLength) * outputs;
  Memory<T> matrices{2 * size, T(0)};  // (2, kLength, outputs), the second of weight_t

  void fill_matrix(const T* weight, const T* bias, T* matrix) {
    for (int k = 0; k < outputs; ++k) {
      for (int c = 0; c < kChannels; ++c) {
        for (int j = 0; j < 9; ++j) {
          matrix[(j * kChannels + c) * outputs + k] = weight[(k * kChannels + c) * 9 + j];
        }
      }
    }
    if (bias != nullptr) {
      std::copy_n(bias, outputs, matrix + static_cast<int64_t>(kBias) * outputs);
    }
  }

  void blocks(int64_t begin, int64_t end) {
    Memory<T> around{static_cast<int64_t>(kPixels) * kLength, T(1)};  // of which the last column, for the bias, stays
    Memory<T> around_t{static_cast<int64_t>(kPixels) * kLength};
    Memory<T> rest{static_cast<int64_t>(kPixels) * outputs};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kPixels, count = std::min<int64_t>(kPixels, pixels - first);
      gather(call.x, first, count, around);
      if (call.y != nullptr) {
        products(around, matrices, nullptr, count, rest, call.y + first * outputs);
      }
      if (call.y_t != nullptr) {
        const T* more = nullptr;
        if (call.x_t != nullptr) {
          gather(call.x_t, first, count, around_t);
          more = around_t;
        }
        products(around, matrices + size, more, count, rest, call.y_t + first * outputs);
      }
    }
  }

  void gather(const T* x, int64_t first, int64_t count, T* to) const {
    Conv3x3Surroundings<T, kChannels>{x, call.height, call.width}.gather(first, count, kLength, to);
  }

  // around matrix + more (the first matrix) into y
  void products(const T* around, const T* matrix, const T* more, int64_t count, T* rest, T* y) const {
    T* to = count == kPixels ? y : rest;
    for (int column = 0; column < outputs; column += Products::kColumns) {
      Products::multiply({around, kLength, 1}, kPixels, matrix + column, outputs, kLength, to + column, outputs, false);
      if (more != nullptr) {
        Products::multiply({more, kLength, 1}, kPixels, matrices + column, outputs, kBias, to + column, outputs, true);
      }
    }
    if (to != y) {
      std::copy_n(to, count * outputs, y);
    }
  }

  void run() {
    fill_matrix(call.weight, call.bias, matrices);
    if (call.y_t != nullptr) {
      fill_matrix(call.weight_t, call.bias_t, matrices + size);
    }
    Products::template over<&Conv3x3FewForward::blocks>(*this, parallel, (pixels + kPixels - 1) / kPixels);
  }
};

// The gradient of the weight: the product of the transposed surroundings and g.
template <typename T, int kChannels>
struct Conv3x3FewGradient {
  using Products = CpuProducts<T>;
  static constexpr int kPixels = 32;  // done together
  static constexpr int kLength = (9 * kChannels + Products::kFewRows - 1) / Products::kFewRows * Products::kFewRows;

  const Conv3x3GradientCall<T>& call;
  const CpuParallel parallel;
  const int outputs = call.outputs;
  const int64_t pixels = call.batch * call.height * call.width;
  // Shares of the images are added in order: the same bits for any number of threads, and sums that are not too long.
  const int64_t shares = std::min<int64_t>(call.batch, 16);
  const Conv3x3Surroundings<T, kChannels> around{call.x, call.height, call.width};
  Memory<T> sums{shares * kLength * outputs, T(0)};  // (shares, outputs / kColumns, kLength, kColumns)

  void pieces(int64_t begin, int64_t end) {
    Memory<T> surroundings{static_cast<int64_t>(kPixels) * kLength, T(0)};
    for (int64_t share = end; share-- > begin;) {  // what was written last is still in the cache
      const int64_t last = pixels * (share + 1) / shares;
      T* sum = sums + share * kLength * outputs;
      for (int64_t first = pixels * share / shares; first < last; first += kPixels) {
        const int64_t count = std::min<int64_t>(kPixels, last - first);
        around.gather(first, count, kLength, surroundings);
        for (int column = 0; column < outputs; column += Products::kColumns) {
          Products::multiply({surroundings, 1, kLength}, kLength, call.g + first * outputs + column, outputs, count,
                             sum + column * kLength, Products::kColumns, true, INT64_MAX, kPixels * outputs);
        }
      }
    }
  }

  void run() {
    Products::template over<&Conv3x3FewGradient::pieces>(*this, parallel, shares);
    for (int k = 0; k < outputs; ++k) {
      for (int c = 0; c < kChannels; ++c) {
        for (int j = 0; j < 9; ++j) {
          T total = 0;
          for (int64_t share = 0; share < shares; ++share) {
            const int64_t panel = share * outputs / Products::kColumns + k / Products::kColumns;
            total += sums[(panel * kLength + j * kChannels + c) * Products::kColumns + k % Products::kColumns];
          }
          call.weight[(k * kChannels + c) * 9 + j] = total;
        }
      }
    }
  }
};

// The gradient of the input, the transposed convolution, which has kOutputs results a pixel.
template <typename T, int kOutputs>
struct Conv3x3FewInputGradient {
  using Products = CpuProducts<T>;
  static constexpr int kFewRows = Products::kFewRows, kColumns = Products::kColumns;
  static constexpr int kPixels = 24;                                                   // done together
  static constexpr int kLength = (9 * kOutputs + kColumns - 1) / kColumns * kColumns;  // what a pixel gives

  const Conv3x3Call<T>& call;
  const CpuParallel parallel;
  const int channels = call.channels;
  const int64_t size = static_cast<int64_t>(call.height) * call.width;
  const int64_t matrix_size = static_cast<int64_t>(channels) * kLength;
  Memory<T> matrices{2 * matrix_size, T(0)};  // (2, channels, kLength), the second of weight_t

  void fill_matrix(const T* weight, T* matrix) {
    for (int c = 0; c < channels; ++c) {
      for (int k = 0; k < kOutputs; ++k) {
        for (int j = 0; j < 9; ++j) {
          matrix[c * kLength + j * kOutputs + k] = weight[(c * kOutputs + k) * 9 + j];
        }
      }
    }
  }

  // Images begin to end - 1: what each pixel gives to the 3 x 3 around it, added up there.
  void images(int64_t begin, int64_t end) {
    Memory<T> rest{static_cast<int64_t>(kPixels) * channels, T(0)};
    Memory<T> given{static_cast<int64_t>(kPixels) * kLength};
    for (int64_t n = begin; n < end; ++n) {
      if (call.y != nullptr) {
        image(n, call.x, matrices, nullptr, call.bias, call.y, rest, given);
      }
      if (call.y_t != nullptr) {
        image(n, call.x, matrices + matrix_size, call.x_t, call.bias_t, call.y_t, rest, given);
      }
    }
  }

  // What image n of x gives by `matrix`, and that of x_t, unless it is null, by the first matrix.
  void image(int64_t n, const T* x, const T* matrix, const T* x_t, const T* bias, T* result, T* rest, T* given) const {
    T* y = result + n * size * kOutputs;
    for (int64_t i = 0; i < size * kOutputs; ++i) {
      y[i] = bias == nullptr ? T(0) : bias[i % kOutputs];
    }
    for (int64_t first = 0; first < size; first += kPixels) {
      const int64_t count = std::min<int64_t>(kPixels, size - first), at = (n * size + first) * channels;
      products(x, at, count, matrix, rest, given, false);
      if (x_t != nullptr) {
        products(x_t, at, count, matrices, rest, given, true);
      }
      add(given, first, count, y);
    }
  }

  // Of `count` pixels, the first of which is at x[at].
  void products(const T* x, int64_t at, int64_t count, const T* matrix, T* rest, T* given, bool add) const {
    const int64_t left = call.batch * size * channels - at, used = count * channels;
    prefetch(x + at + used, std::min<int64_t>(kPixels * channels, left - used));
    const T* pixels = count % kFewRows == 0 ? x + at : std::copy_n(x + at, used, rest) - used;
    const int64_t rows = (count + kFewRows - 1) / kFewRows * kFewRows;
    for (int column = 0; column < kLength; column += kColumns) {
      Products::multiply({pixels, channels, 1}, rows, matrix + column, kLength, channels, given + column, kLength, add);
    }
  }

  void add(const T* given, int64_t first, int64_t count, T* y) const {
    for (int64_t p = first; p < first + count; ++p, given += kLength) {
      const int row = static_cast<int>(p / call.width), column = static_cast<int>(p % call.width);
      const int left = column == 0, right = column + 1 == call.width;
      for (int i = row == 0; i < 3 && row + i <= call.height; ++i) {
        T* to = y + (p + static_cast<int64_t>(i - 1) * call.width - 1) * kOutputs;
        const T* from = given + 3 * i * kOutputs;
        if (left + right == 0) {
#pragma GCC unroll 12
          for (int k = 0; k < 3 * kOutputs; ++k) {
            to[k] += from[k];
          }
        } else {
          for (int k = left * kOutputs; k < (3 - right) * kOutputs; ++k) {
            to[k] += from[k];
          }
        }
      }
    }
  }

  void run() {
    fill_matrix(call.weight, matrices);
    if (call.y_t != nullptr) {
      fill_matrix(call.weight_t, matrices + matrix_size);
    }
    Products::template over<&Conv3x3FewInputGradient::images>(*this, parallel, call.batch);
  }
};

template <typename T, int kChannels>
void run_of(const Conv3x3Call<T>& call, CpuParallel parallel) {
  if (call.transposed) {
    Conv3x3FewInputGradient<T, kChannels>{call, parallel}.run();
  } else {
    Conv3x3FewForward<T, kChannels>{call, parallel}.run();
  }
}

template <typename T, int kChannels>
void run_of(const Conv3x3GradientCall<T>& call, CpuParallel parallel) {
  Conv3x3FewGradient<T, kChannels>{call, parallel}.run();
}

// `channels` of the input: 1 to kConv3x3Few.
template <typename T, template <typename> typename Call>
void run_few(const Call<T>& call, int channels, CpuParallel parallel) {
  static_assert(kConv3x3Few == 4);
  with_few(channels, [&](auto few) { run_of<T, few>(call, parallel); });
}
