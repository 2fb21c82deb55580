// Products of matrices for CPU loops, which include this once for each set of vector instructions (cpu_each_level.h),
// so there is no include guard; SELMATCH_LANES is the bytes of a vector.

// Products of matrices: a block of the result stays in registers.
template <typename T>
struct CpuProducts {
  typedef T Lanes __attribute__((vector_size(SELMATCH_LANES)));
  static constexpr int kLanes = SELMATCH_LANES / sizeof(T);
  // Of the block of a matrix product that stays in registers, of which AVX-512 has 32 and the others have 16. With 6
  // rows 12 sums are in progress, more than the 8 that hide the time of a multiply-add; what 6 do not divide takes 4.
  static constexpr int kRows = SELMATCH_LANES == 64 ? 8 : 6, kFewRows = 4, kColumns = 2 * kLanes;

  static constexpr int up_to(int number, int multiple) { return (number + multiple - 1) / multiple * multiple; }

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

  // out[r][0..kColumns) = (or +=, where `add`) sum over d of a[r, d] b[d b_stride + 0..kColumns) for r below `rows`, a
  // multiple of kFewRows. `chunk` products are added up before they are added to others: short sums round less. The
  // right factor of the next product, `ahead` numbers from b on, is fetched meanwhile.
  static SELMATCH_HD void multiply(Rows a, int64_t rows, const T* b, int64_t b_stride, int64_t depth, T* out,
                                   int64_t out_stride, bool add, int64_t chunk = INT64_MAX, int64_t ahead = 0) {
    int64_t many = rows;
    while (many % kRows != 0) {
      many -= kFewRows;
    }
    for (int64_t row = 0; row < rows;) {
      const T* from = a.at + row * a.row_stride;
      T* to = out + row * out_stride;
      if (row < many) {
        multiply_block<kRows>(from, a.row_stride, a.depth_stride, b, b_stride, depth, to, out_stride, add, chunk,
                              ahead);
        row += kRows;
      } else {
        multiply_block<kFewRows>(from, a.row_stride, a.depth_stride, b, b_stride, depth, to, out_stride, add, chunk,
                                 ahead);
        row += kFewRows;
      }
    }
  }

  template <int kBlock>
  static SELMATCH_HD void multiply_block(const T* a, int64_t row_stride, int64_t depth_stride, const T* b,
                                         int64_t b_stride, int64_t depth, T* out, int64_t out_stride, bool add,
                                         int64_t chunk, int64_t ahead) {
    while (depth > 0) {
      Lanes left[kBlock] = {}, right[kBlock] = {};
      for (int64_t d = std::min(chunk, depth); d > 0; --d, a += depth_stride, b += b_stride) {
        if (ahead != 0) {
          __builtin_prefetch(b + ahead);
        }
        const Lanes b_left = load(b), b_right = load(b + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kBlock; ++r) {
          const T value = a[r * row_stride];
          left[r] += value * b_left;
          right[r] += value * b_right;
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kBlock; ++r) {
        T* to = out + r * out_stride;
        store(add ? load(to) + left[r] : left[r], to);
        store(add ? load(to + kLanes) + right[r] : right[r], to + kLanes);
      }
      depth -= chunk;
      add = true;
    }
  }

  template <auto kStage, typename Work>
  static void over(Work& work, CpuParallel parallel, int64_t count) {
    parallel(&work, count,
             [](void* self, int64_t begin, int64_t end) { (static_cast<Work*>(self)->*kStage)(begin, end); });
  }
};

// Calls with the number of channels of an image, 1 to 4, known when it is compiled.
template <typename Call>
void with_few(int channels, const Call& call) {
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
