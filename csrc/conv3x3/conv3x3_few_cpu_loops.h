// The gradient of the input of a 3 x 3 convolution whose input has few channels, as images have: matrix products over
// pixels, since too little comes out for the transforms of conv3x3_cpu_loops.h to pay. Included by it, once for each
// set of vector instructions.

template <typename T>
struct Conv3x3FewLoops {
  using Products = Conv3x3Loops<T>;
  static constexpr int kFewRows = Products::kFewRows, kColumns = Products::kColumns;
  static constexpr int kPixels = 64;  // done together

  const Conv3x3Call<T>& call;
  const CpuParallel parallel;
  const int channels = call.channels, outputs = call.outputs;
  const int length = (9 * outputs + kColumns - 1) / kColumns * kColumns;  // what a pixel gives, in whole blocks
  const int64_t size = static_cast<int64_t>(call.height) * call.width;
  Memory<T> matrix{static_cast<int64_t>(channels) * length, T(0)};  // (channels, length)

  void fill_matrix() {
    for (int c = 0; c < channels; ++c) {
      for (int k = 0; k < outputs; ++k) {
        for (int j = 0; j < 9; ++j) {
          matrix[c * length + j * outputs + k] = call.weight[(c * outputs + k) * 9 + j];
        }
      }
    }
  }

  // Images begin to end - 1: what each pixel gives to the 3 x 3 around it, added up there.
  void images(int64_t begin, int64_t end) {
    Memory<T> rest{static_cast<int64_t>(kPixels) * channels, T(0)};
    Memory<T> given{static_cast<int64_t>(kPixels) * length};
    for (int64_t n = begin; n < end; ++n) {
      const T* x = call.x + n * size * channels;
      T* y = call.y + n * size * outputs;
      for (int64_t i = 0; i < size * outputs; ++i) {
        y[i] = call.bias == nullptr ? T(0) : call.bias[i % outputs];
      }
      for (int64_t first = 0; first < size; first += kPixels) {
        const int64_t count = std::min<int64_t>(kPixels, size - first);
        products(x + first * channels, count, rest, given);
        add(given, first, count, y);
      }
    }
  }

  void products(const T* x, int64_t count, T* rest, T* given) const {
    // The next pixels: products walk through a block in strides, which no cache foresees.
    const T* end = std::min(x + (count + kPixels) * channels, call.x + call.batch * size * channels);
    for (const T* p = x + count * channels; p < end; p += 64 / sizeof(T)) {
      __builtin_prefetch(p);
    }
    if (count % kFewRows != 0) {
      x = std::copy_n(x, count * channels, rest) - count * channels;
    }
    const int64_t rows = (count + kFewRows - 1) / kFewRows * kFewRows;
    for (int column = 0; column < length; column += kColumns) {
      Products::template multiply<false>({x, channels, 1}, rows, matrix + column, length, channels, given + column,
                                         length);
    }
  }

  void add(const T* given, int64_t first, int64_t count, T* y) const {
    for (int64_t p = first; p < first + count; ++p, given += length) {
      const int row = static_cast<int>(p / call.width), column = static_cast<int>(p % call.width);
      for (int j = 0; j < 9; ++j) {
        const int i = row - 1 + j / 3, k = column - 1 + j % 3;
        if (i >= 0 && i < call.height && k >= 0 && k < call.width) {
          T* to = y + (static_cast<int64_t>(i) * call.width + k) * outputs;
          for (int f = 0; f < outputs; ++f) {
            to[f] += given[j * outputs + f];
          }
        }
      }
    }
  }

  void run() {
    fill_matrix();
    Products::template over<&Conv3x3FewLoops::images>(*this, parallel, call.batch);
  }
};
