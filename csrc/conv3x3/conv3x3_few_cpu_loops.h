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
  using Products = Conv3x3Products<T>;
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

  // `count` pixels of all images from `first` on.
  void add(int64_t first, int64_t count) const {
    Memory<T> around{static_cast<int64_t>(kPixels) * kLength, T(1)};  // of which the last column, for the bias, stays
    Memory<T> around_t{static_cast<int64_t>(kPixels) * kLength};
    Memory<T> rest{static_cast<int64_t>(kPixels) * outputs};
    for (int64_t end = first + count; first < end; first += kPixels) {
      const int64_t now = std::min<int64_t>(kPixels, end - first);
      gather(call.x, first, now, around);
      if (call.y != nullptr) {
        products(around, matrices, nullptr, now, rest, call.y + first * outputs);
      }
      if (call.y_t != nullptr) {
        const T* more = nullptr;
        if (call.x_t != nullptr) {
          gather(call.x_t, first, now, around_t);
          more = around_t;
        }
        products(around, matrices + size, more, now, rest, call.y_t + first * outputs);
      }
    }
  }

  void blocks(int64_t begin, int64_t end) { add(begin * kPixels, std::min(end * kPixels, pixels) - begin * kPixels); }

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

  void set_matrices() {
    fill_matrix(call.weight, call.bias, matrices);
    if (call.y_t != nullptr) {
      fill_matrix(call.weight_t, call.bias_t, matrices + size);
    }
  }

  void run() {
    set_matrices();
    Products::template over<&Conv3x3FewForward::blocks>(*this, parallel, (pixels + kPixels - 1) / kPixels);
  }
};

// The gradient of the weight: the product of the transposed surroundings and g. It is the sum of several shares, which
// are added in order: the same bits for any number of threads, and sums that are not too long.
template <typename T, int kChannels>
struct Conv3x3FewSums {
  using Products = Conv3x3Products<T>;
  static constexpr int kPixels = 32;  // done together
  static constexpr int kLength = (9 * kChannels + Products::kFewRows - 1) / Products::kFewRows * Products::kFewRows;

  const Conv3x3Surroundings<T, kChannels> around;
  const int outputs;
  const int64_t size = static_cast<int64_t>(kLength) * outputs;  // of a share: (outputs / kColumns, kLength, kColumns)

  // Adds `count` pixels of all images from `first` on to a share. g: (count, outputs); `ahead` numbers from what is
  // read on, more of it is fetched.
  void add(int64_t first, int64_t count, const T* g, T* sum, int64_t ahead) const {
    Memory<T> surroundings{static_cast<int64_t>(kPixels) * kLength, T(0)};
    for (int64_t done = 0; done < count; done += kPixels) {
      const int64_t now = std::min<int64_t>(kPixels, count - done);
      around.gather(first + done, now, kLength, surroundings);
      for (int column = 0; column < outputs; column += Products::kColumns) {
        Products::multiply({surroundings, 1, kLength}, kLength, g + done * outputs + column, outputs, now,
                           sum + column * kLength, Products::kColumns, true, INT64_MAX, ahead);
      }
    }
  }

  // Adds up the shares, in the first of them.
  void total(T* sums, int64_t shares, T* weight) const {
    for (int64_t share = 1; share < shares; ++share) {
      const T* more = sums + share * size;
      for (int64_t k = 0; k < size; ++k) {
        sums[k] += more[k];
      }
    }
    for (int k = 0; k < outputs; ++k) {
      const T* panel = sums + k / Products::kColumns * kLength * Products::kColumns + k % Products::kColumns;
      for (int c = 0; c < kChannels; ++c) {
        for (int j = 0; j < 9; ++j) {
          weight[(k * kChannels + c) * 9 + j] = panel[(j * kChannels + c) * Products::kColumns];
        }
      }
    }
  }
};

template <typename T, int kChannels>
struct Conv3x3FewGradient {
  const Conv3x3GradientCall<T>& call;
  const CpuParallel parallel;
  const Conv3x3FewSums<T, kChannels> all{{call.x, call.height, call.width}, call.outputs};
  const int64_t pixels = call.batch * call.height * call.width, shares = std::min<int64_t>(call.batch, 16);
  Memory<T> sums{shares * all.size, T(0)};

  void pieces(int64_t begin, int64_t end) {
    for (int64_t share = end; share-- > begin;) {  // what was written last is still in the cache
      const int64_t first = pixels * share / shares, last = pixels * (share + 1) / shares;
      all.add(first, last - first, call.g + first * call.outputs, sums + share * all.size, all.kPixels * call.outputs);
    }
  }

  void run() {
    Conv3x3Products<T>::template over<&Conv3x3FewGradient::pieces>(*this, parallel, shares);
    all.total(sums, shares, call.weight);
  }
};

// The gradient of the input, the transposed convolution, which has kOutputs results a pixel: what each pixel gives to
// the 3 x 3 around it, added up there.
template <typename T, int kOutputs>
struct Conv3x3FewSpread {
  using Products = Conv3x3Products<T>;
  static constexpr int kFewRows = Products::kFewRows, kColumns = Products::kColumns;
  static constexpr int kPixels = 24;                                                   // done together
  static constexpr int kLength = (9 * kOutputs + kColumns - 1) / kColumns * kColumns;  // what a pixel gives

  const int height, width, channels;
  const int64_t matrix_size = static_cast<int64_t>(channels) * kLength;
  Memory<T> matrices{2 * matrix_size, T(0)};  // (2, channels, kLength), the second of the weight's tangent

  void set_matrix(int index, const T* weight) {
    T* matrix = matrices + index * matrix_size;
    for (int c = 0; c < channels; ++c) {
      for (int k = 0; k < kOutputs; ++k) {
        for (int j = 0; j < 9; ++j) {
          matrix[c * kLength + j * kOutputs + k] = weight[(c * kOutputs + k) * 9 + j];
        }
      }
    }
  }

  // Adds to the image y what `count` of its pixels give, from `first` on: those of x by matrix `index`, and those of
  // x_t, unless it is null, by the first one. x, x_t: (count, channels)
  void add(int64_t first, int64_t count, const T* x, int index, const T* x_t, T* y) const {
    Memory<T> rest{static_cast<int64_t>(kPixels) * channels};
    Memory<T> given{static_cast<int64_t>(kPixels) * kLength};
    for (int64_t done = 0; done < count; done += kPixels) {
      const int64_t now = std::min<int64_t>(kPixels, count - done), next = std::min(count - done - now, now);
      products(x + done * channels, now, next, matrices + index * matrix_size, rest, given, false);
      if (x_t != nullptr) {
        products(x_t + done * channels, now, next, matrices, rest, given, true);
      }
      give(given, first + done, now, y);
    }
  }

  // Of `count` pixels, while the `next` ones are fetched.
  void products(const T* x, int64_t count, int64_t next, const T* matrix, T* rest, T* given, bool add) const {
    prefetch(x + count * channels, next * channels);
    const int64_t rows = (count + kFewRows - 1) / kFewRows * kFewRows;
    if (rows > count) {
      std::fill(std::copy_n(x, count * channels, rest), rest + rows * channels, T(0));
      x = rest;
    }
    for (int column = 0; column < kLength; column += kColumns) {
      Products::multiply({x, channels, 1}, rows, matrix + column, kLength, channels, given + column, kLength, add);
    }
  }

  void give(const T* given, int64_t first, int64_t count, T* y) const {
    for (int64_t p = first; p < first + count; ++p, given += kLength) {
      const int row = static_cast<int>(p / width), column = static_cast<int>(p % width);
      const int left = column == 0, right = column + 1 == width;
      for (int i = row == 0; i < 3 && row + i <= height; ++i) {
        T* to = y + (p + static_cast<int64_t>(i - 1) * width - 1) * kOutputs;
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
};

template <typename T, int kOutputs>
struct Conv3x3FewInputGradient {
  const Conv3x3Call<T>& call;
  const CpuParallel parallel;
  const int64_t size = static_cast<int64_t>(call.height) * call.width;
  Conv3x3FewSpread<T, kOutputs> all{call.height, call.width, call.channels};

  void images(int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (call.y != nullptr) {
        image(n, 0, nullptr, call.bias, call.y);
      }
      if (call.y_t != nullptr) {
        image(n, 1, call.x_t, call.bias_t, call.y_t);
      }
    }
  }

  // What image n of x gives by matrix `index`, and that of x_t, unless it is null, by the first matrix.
  void image(int64_t n, int index, const T* x_t, const T* bias, T* result) const {
    T* y = result + n * size * kOutputs;
    for (int64_t i = 0; i < size * kOutputs; ++i) {
      y[i] = bias == nullptr ? T(0) : bias[i % kOutputs];
    }
    const int64_t at = n * size * call.channels;
    all.add(0, size, call.x + at, index, x_t == nullptr ? nullptr : x_t + at, y);
  }

  void run() {
    all.set_matrix(0, call.weight);
    if (call.y_t != nullptr) {
      all.set_matrix(1, call.weight_t);
    }
    Conv3x3Products<T>::template over<&Conv3x3FewInputGradient::images>(*this, parallel, call.batch);
  }
};

template <typename T, int kChannels>
class Conv3x3PieceForwardOf : public Conv3x3PieceForward<T> {
 public:
  explicit Conv3x3PieceForwardOf(const Conv3x3Call<T>& call) : call_(call) { forward_.set_matrices(); }
  void compute(int64_t image, int64_t first, int64_t count) override {
    forward_.add(image * call_.height * call_.width + first, count);
  }

 private:
  const Conv3x3Call<T> call_;
  Conv3x3FewForward<T, kChannels> forward_{call_, nullptr};
};

// Both gradients, of pieces of the result's gradient as they are computed. Each image is a share of the weight's
// gradient.
template <typename T, int kChannels>
class Conv3x3PieceBackwardOf : public Conv3x3PieceBackward<T> {
 public:
  explicit Conv3x3PieceBackwardOf(const Conv3x3PieceBackwardCall<T>& call) : call_(call) {
    if (call.x_grad_t != nullptr) {
      spread_.set_matrix(0, call.weight);
      spread_.set_matrix(1, call.weight_t);
    }
  }

  void add(int64_t image, int64_t first, int64_t count, const T* g, const T* g_t) override {
    if (call_.weight_grad != nullptr) {
      T* sum = shares_ + image * sums_.size;
      if (first == 0) {
        std::fill_n(sum, sums_.size, T(0));
      }
      sums_.add(image * size_ + first, count, g_t == nullptr ? g : g_t, sum, 0);
    }
    if (call_.x_grad_t != nullptr) {
      T* y = call_.x_grad_t + image * size_ * kChannels;
      if (first == 0) {
        std::fill_n(y, size_ * kChannels, T(0));
      }
      spread_.add(first, count, g, 1, g_t, y);
    }
  }

  void finish() override {
    if (call_.weight_grad != nullptr) {
      sums_.total(shares_, call_.batch, call_.weight_grad);
    }
  }

 private:
  const Conv3x3PieceBackwardCall<T> call_;
  const int64_t size_ = static_cast<int64_t>(call_.height) * call_.width;
  const Conv3x3FewSums<T, kChannels> sums_{{call_.x, call_.height, call_.width}, call_.outputs};
  Memory<T> shares_{call_.weight_grad == nullptr ? 0 : call_.batch * sums_.size};
  Conv3x3FewSpread<T, kChannels> spread_{call_.height, call_.width, call_.outputs};
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

// call(channels) with the number of channels of the input, 1 to kConv3x3Few, known when it is compiled.
template <typename Call>
auto with_few(int channels, const Call& call) {
  static_assert(kConv3x3Few == 4);
  switch (channels) {
    case 1:
      return call(std::integral_constant<int, 1>());
    case 2:
      return call(std::integral_constant<int, 2>());
    case 3:
      return call(std::integral_constant<int, 3>());
    default:
      return call(std::integral_constant<int, 4>());
  }
}

template <typename T, template <typename> typename Call>
void run_few(const Call<T>& call, int channels, CpuParallel parallel) {
  with_few(channels, [&](auto few) { run_of<T, few>(call, parallel); });
}

template <typename T>
std::unique_ptr<Conv3x3PieceForward<T>> make_piece_forward(const Conv3x3Call<T>& call) {
  return with_few(call.channels, [&](auto few) -> std::unique_ptr<Conv3x3PieceForward<T>> {
    return std::make_unique<Conv3x3PieceForwardOf<T, few>>(call);
  });
}

template <typename T>
std::unique_ptr<Conv3x3PieceBackward<T>> make_piece_backward(const Conv3x3PieceBackwardCall<T>& call) {
  return with_few(call.channels, [&](auto few) -> std::unique_ptr<Conv3x3PieceBackward<T>> {
    return std::make_unique<Conv3x3PieceBackwardOf<T, few>>(call);
  });
}
