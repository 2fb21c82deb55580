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
  using Products = Conv3x3Loops<T>;
  static constexpr int kPixels = 24;  // done together: their results stay in the first cache
  static constexpr int kBias = 9 * kChannels, kLength = kBias + 1;  // of the matrix: the last row is the bias

  const Conv3x3Call<T>& call;
  const CpuParallel parallel;
  const int outputs = call.outputs;
  const int64_t pixels = call.batch * call.height * call.width;
  const Conv3x3Surroundings<T, kChannels> around{call.x, call.height, call.width};
  Memory<T> matrix{static_cast<int64_t>(kLength) * outputs, T(0)};  // (kLength, outputs)

  void fill_matrix() {
    for (int k = 0; k < outputs; ++k) {
      for (int c = 0; c < kChannels; ++c) {
        for (int j = 0; j < 9; ++j) {
          matrix[(j * kChannels + c) * outputs + k] = call.weight[(k * kChannels + c) * 9 + j];
        }
      }
    }
    if (call.bias != nullptr) {
      std::copy_n(call.bias, outputs, matrix + static_cast<int64_t>(kBias) * outputs);
    }
  }

  void blocks(int64_t begin, int64_t end) {
    Memory<T> surroundings{static_cast<int64_t>(kPixels) * kLength, T(1)};  // of which the last column stays
    Memory<T> rest{static_cast<int64_t>(kPixels) * outputs};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kPixels, count = std::min<int64_t>(kPixels, pixels - first);
      around.gather(first, count, kLength, surroundings);
      T *y = call.y + first * outputs, *to = count == kPixels ? y : rest;
      for (int column = 0; column < outputs; column += Products::kColumns) {
        Products::template multiply<false>({surroundings, kLength, 1}, kPixels, matrix + column, outputs, kLength,
                                           to + column, outputs);
      }
      if (to != y) {
        std::copy_n(to, count * outputs, y);
      }
    }
  }

  void run() {
    fill_matrix();
    Products::template over<&Conv3x3FewForward::blocks>(*this, parallel, (pixels + kPixels - 1) / kPixels);
  }
};

// The gradient of the weight: the product of the transposed surroundings and g.
template <typename T, int kChannels>
struct Conv3x3FewGradient {
  using Products = Conv3x3Loops<T>;
  static constexpr int kPixels = 48;  // done together
  static constexpr int kLength = (9 * kChannels + Products::kFewRows - 1) / Products::kFewRows * Products::kFewRows;

  const Conv3x3GradientCall<T>& call;
  const CpuParallel parallel;
  const int outputs = call.outputs;
  const int64_t pixels = call.batch * call.height * call.width;
  // Shares of the images are added in order: the same bits for any number of threads, and sums that are not too long.
  const int64_t shares = std::min<int64_t>(call.batch, 16);
  const Conv3x3Surroundings<T, kChannels> around{call.x, call.height, call.width};
  Memory<T> sums{shares * kLength * outputs, T(0)};  // (shares, kLength, outputs)

  void pieces(int64_t begin, int64_t end) {
    Memory<T> surroundings{static_cast<int64_t>(kPixels) * kLength, T(0)};
    for (int64_t share = begin; share < end; ++share) {
      const int64_t last = pixels * (share + 1) / shares;
      T* sum = sums + share * kLength * outputs;
      for (int64_t first = pixels * share / shares; first < last; first += kPixels) {
        const int64_t count = std::min<int64_t>(kPixels, last - first);
        around.gather(first, count, kLength, surroundings);
        prefetch(call.g + (first + count) * outputs, std::min<int64_t>(kPixels, last - first - count) * outputs);
        for (int column = 0; column < outputs; column += Products::kColumns) {
          Products::template multiply<true>({surroundings, 1, kLength}, kLength, call.g + first * outputs + column,
                                            outputs, count, sum + column, outputs);
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
            total += sums[(share * kLength + j * kChannels + c) * outputs + k];
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
  using Products = Conv3x3Loops<T>;
  static constexpr int kFewRows = Products::kFewRows, kColumns = Products::kColumns;
  static constexpr int kPixels = 64;                                                   // done together
  static constexpr int kLength = (9 * kOutputs + kColumns - 1) / kColumns * kColumns;  // what a pixel gives

  const Conv3x3Call<T>& call;
  const CpuParallel parallel;
  const int channels = call.channels;
  const int64_t size = static_cast<int64_t>(call.height) * call.width;
  Memory<T> matrix{static_cast<int64_t>(channels) * kLength, T(0)};  // (channels, kLength)

  void fill_matrix() {
    for (int c = 0; c < channels; ++c) {
      for (int k = 0; k < kOutputs; ++k) {
        for (int j = 0; j < 9; ++j) {
          matrix[c * kLength + j * kOutputs + k] = call.weight[(c * kOutputs + k) * 9 + j];
        }
      }
    }
  }

  // Images begin to end - 1: what each pixel gives to the 3 x 3 around it, added up there.
  void images(int64_t begin, int64_t end) {
    Memory<T> rest{static_cast<int64_t>(kPixels) * channels, T(0)};
    Memory<T> given{static_cast<int64_t>(kPixels) * kLength};
    for (int64_t n = begin; n < end; ++n) {
      const T* x = call.x + n * size * channels;
      T* y = call.y + n * size * kOutputs;
      for (int64_t i = 0; i < size * kOutputs; ++i) {
        y[i] = call.bias == nullptr ? T(0) : call.bias[i % kOutputs];
      }
      for (int64_t first = 0; first < size; first += kPixels) {
        const int64_t count = std::min<int64_t>(kPixels, size - first);
        products(x + first * channels, count, rest, given);
        add(given, first, count, y);
      }
    }
  }

  void products(const T* x, int64_t count, T* rest, T* given) const {
    const int64_t left = call.x + call.batch * size * channels - x;
    prefetch(x + count * channels, std::min<int64_t>(kPixels * channels, left - count * channels));
    if (count % kFewRows != 0) {
      x = std::copy_n(x, count * channels, rest) - count * channels;
    }
    const int64_t rows = (count + kFewRows - 1) / kFewRows * kFewRows;
    for (int column = 0; column < kLength; column += kColumns) {
      Products::template multiply<false>({x, channels, 1}, rows, matrix + column, kLength, channels, given + column,
                                         kLength);
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
    fill_matrix();
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
  switch (channels) {
    case 1:
      return run_of<T, 1>(call, parallel);
    case 2:
      return run_of<T, 2>(call, parallel);
    case 3:
      return run_of<T, 3>(call, parallel);
    default:
      return run_of<T, 4>(call, parallel);
  }
}
