// The loops of a first layer. conv_block_cpu_loops.cpp includes this once for each set of vector instructions, in a
// namespace of its own, so there is no include guard; SELMATCH_LANES is the bytes of a vector.

#include "conv_block/conv_block_matrices_cpu_loops.h"

template <typename T, int kChannels>
struct ConvBlockLoops {
  using Products = CpuProducts<T>;
  using Exact = CpuProducts<double>;
  using Matrices = ConvBlockMatrices<T>;
  using Lanes = typename Products::Lanes;
  using Word = typename ConvBlockCall<T>::Word;
  typedef Word Words __attribute__((vector_size(SELMATCH_LANES)));
  typedef std::make_signed_t<Word> Signs __attribute__((vector_size(SELMATCH_LANES)));
  static constexpr Word kFirst = Word(1) << (8 * sizeof(Word) - 1);  // the bit of a piece's first pixel

  static constexpr int kLanes = Products::kLanes, kColumns = Products::kColumns, kPixels = kConvBlockPixels;
  static constexpr int kAround = 9 * kChannels, kLength = kAround + 1;        // of a patch, and with the 1
  static constexpr int kRows = Products::up_to(kLength, Products::kFewRows);  // as products take them
  static constexpr int kPieces = 16;  // that are added up in T; more round too much where G loses digits
  static constexpr int kExact = Products::up_to(kLength, Exact::kColumns), kGiven = Products::up_to(kAround, kColumns);

  const ConvBlockCall<T>& call;
  const CpuParallel parallel;
  const bool per_image = call.norm == kBlockSampleNorm;  // image has matrices of its own
  const int outputs = call.outputs, side = call.pool == kBlockNoPool ? 1 : 2, window = side * side;  // of pixels
  const int out_height = call.height / side, out_width = call.width / side;
  const int64_t pixels = static_cast<int64_t>(call.height) * call.width;
  const int64_t outs = static_cast<int64_t>(out_height) * out_width;
  const int64_t pieces = conv_block_pieces(call.height, call.width, call.pool);        // of windows
  const int64_t bordered = (call.height + 2) * (call.width + int64_t{2}) * kChannels;  // an image with zeros around it
  const int64_t size = static_cast<int64_t>(kRows) * outputs;                          // of a matrix
  const std::vector<int64_t> places = make_places();

  // Images are added up in shares, and these in order: the same bits for any number of threads. What is added up are
  // moments; or G and Gt; or, where each image has matrices of its own, gradients of the weight, of gamma and beta.
  const int64_t back_size = (call.gt == nullptr ? 1 : 2) * size;  // of G, and Gt
  const int64_t shares = std::min<int64_t>(call.batch, 16);
  const int64_t share_size = call.g == nullptr ? kRows * kExact : per_image ? size + 2 * outputs : back_size;
  Memory<double> sums{shares * share_size, 0.0};

  // What the loops take of the matrices: N and Nt; what a pixel gives to its patch by a, at and P.
  struct Factors {
    Memory<T> n, by_a, by_at, by_p;
    explicit Factors(const ConvBlockLoops& all)
        : n(2 * all.size), by_a(all.outputs * kGiven, 0), by_at(all.outputs * kGiven, 0), by_p(kLength * kGiven, 0) {}
  };
  Factors factors{*this};  // of all images

  // What a thread works with.
  struct Thread {
    Memory<T> image, result;           // of x and its gradient, with a border
    Memory<T> around;                  // P of a piece, (kPixels, kRows)
    Memory<T> left, right;             // of a piece, (kPixels, kColumns)
    Memory<T> a, given;                // of a piece, (kPixels, outputs) and (kPixels, kGiven)
    Memory<T> sum;                     // of an image: G and Gt
    Memory<double> exact;              // P of a piece, (kPixels, kExact)
    Memory<double> exact_sum;          // moments of an image, or its G and Gt
    std::optional<Matrices> matrices;  // where each image has its own
    Factors factors;

    explicit Thread(const ConvBlockLoops& all)
        : image(all.bordered, 0),
          result(all.bordered),
          around(kPixels * kRows, 0),
          left(kPixels * kColumns),
          right(kPixels * kColumns),
          a(int64_t{kPixels} * all.outputs),
          given(kPixels * kGiven),
          sum(2 * all.size),
          exact(kPixels * kExact, 0),
          exact_sum(2 * all.size),
          factors(all) {
      if (all.per_image) {
        matrices.emplace(all.call);
      }
    }
  };

  // Where the patch of each pixel begins in an image with its border: the pixels of windows, window by window,
  // then those that pooling leaves out.
  std::vector<int64_t> make_places() const {
    std::vector<int64_t> found;
    const auto add = [&](int row, int column) {
      found.push_back((row * (call.width + int64_t{2}) + column) * kChannels);
    };
    for (int i = 0; i < out_height; ++i) {
      for (int j = 0; j < out_width; ++j) {
        for (int k = 0; k < window; ++k) {
          add(side * i + k / 2, side * j + k % 2);
        }
      }
    }
    for (int row = 0; row < call.height; ++row) {
      for (int column = row < side * out_height ? side * out_width : 0; column < call.width; ++column) {
        add(row, column);
      }
    }
    return found;
  }

  // Image n of x, in the middle of zeros.
  void set_image(int64_t n, T* image) const {
    const int64_t row = static_cast<int64_t>(call.width) * kChannels;
    for (int i = 0; i < call.height; ++i) {
      std::copy_n(call.x + n * pixels * kChannels + i * row, row, image + (i + 1) * (row + 2 * kChannels) + kChannels);
    }
  }

  // The patches of pixels first to first + kPixels - 1, a row of kStride numbers for each: the last one of kLength
  // is 1, and what is behind it stays. Rows of pixels that there are not are 0.
  template <int kStride, typename To>
  void gather(const T* image, int64_t first, To* to) const {
    const int64_t count = std::min<int64_t>(kPixels, pixels - first), row = (call.width + int64_t{2}) * kChannels;
    for (int64_t p = first; p < first + count; ++p, to += kStride) {
      const T* from = image + places[p];
      for (int i = 0; i < 3; ++i, from += row) {
#pragma GCC unroll 12
        for (int k = 0; k < 3 * kChannels; ++k) {
          to[3 * kChannels * i + k] = from[k];
        }
      }
      to[kAround] = To(1);
    }
    std::fill_n(to, (kPixels - count) * kStride, To(0));
  }

  // Calls image(n, the sums of its share) for the images of shares begin to end - 1.
  template <typename Image>
  void for_images(int64_t begin, int64_t end, const Image& image) const {
    for (int64_t share = begin; share < end; ++share) {
      for (int64_t n = call.batch * share / shares; n < call.batch * (share + 1) / shares; ++n) {
        image(n, sums + share * share_size);
      }
    }
  }

  // Adds up the shares, in the first of them.
  void add_shares() {
    for (int64_t share = 1; share < shares; ++share) {
      for (int64_t k = 0; k < share_size; ++k) {
        sums[k] += sums[share * share_size + k];
      }
    }
  }

  // --- forward -------------------------------------------------------------------------------------------------------

  // Adds the image's moments to sum, (kRows, kExact), of which the upper triangle counts: M is symmetric.
  void add_moments(Thread& thread, double* sum) const {
    for (int64_t first = 0; first < pixels; first += kPixels) {
      gather<kExact>(thread.image, first, thread.exact + 0);
      for (int column = 0; column < kLength; column += Exact::kColumns) {
        Exact::multiply({thread.exact, 1, kExact}, std::min(column + Exact::kColumns, kRows), thread.exact + column,
                        kExact, kPixels, sum + column, kExact, true);
      }
    }
  }

  void batch_moments(int64_t begin, int64_t end) {
    Thread thread(*this);
    for_images(begin, end, [&](int64_t n, double* sum) {
      set_image(n, thread.image);
      add_moments(thread, sum);
    });
  }

  // The matrices for row `row` of statistics, and what the call asks for of them. sum: of `add_moments`
  void set_matrices(const double* sum, int64_t row, Matrices& matrices, Factors& to) const {
    double *all = call.moments + row * kLength * kLength, *stats = call.stats + row * 2 * outputs;
    for (int i = 0; i < kLength; ++i) {
      for (int j = 0; j < kLength; ++j) {
        all[i * kLength + j] = sum[std::min(i, j) * kExact + std::max(i, j)];
      }
    }
    matrices.set_moments(all);
    std::copy_n(matrices.mean + 0, outputs, stats);
    std::copy_n(matrices.r + 0, outputs, stats + outputs);
    matrices.set_n(to.n);
    if (call.weight_t != nullptr) {
      matrices.set_n_t(to.n + size);
    }
  }

  template <bool kDual, int kPool>
  void forward(int64_t begin, int64_t end) {
    Thread thread(*this);
    for (int64_t n = begin; n < end; ++n) {
      set_image(n, thread.image);
      if (per_image) {
        std::fill_n(thread.exact_sum + 0, kRows * kExact, 0.0);
        add_moments(thread, thread.exact_sum);
        set_matrices(thread.exact_sum, n, *thread.matrices, thread.factors);
      }
      forward_image<kDual, kPool>(n, thread, per_image ? thread.factors.n : factors.n);
    }
  }

  // matrix: N, and Nt behind it
  template <bool kDual, int kPool>
  void forward_image(int64_t image, Thread& thread, const T* matrix) const {
    for (int64_t piece = 0; piece < pieces; ++piece) {
      gather<kRows>(thread.image, piece * kPixels, thread.around + 0);
      for (int column = 0; column < outputs; column += kColumns) {
        multiply(thread.around, matrix + column, thread.left);
        if (kDual) {
          multiply(thread.around, matrix + size + column, thread.right);
        }
        for (int c = 0; c < kColumns; c += kLanes) {
          activate<kDual, kPool>(image, piece, thread.left + c, thread.right + c, column + c);
        }
      }
    }
  }

  // n or nt of a piece and kColumns outputs
  void multiply(const T* around, const T* matrix, T* to) const {
    Products::multiply({around, kRows, 1}, kPixels, matrix, outputs, kLength, to, kColumns, false);
  }

  // The windows of a piece: y, yt and the bits of kLanes outputs.
  template <bool kDual, int kPool>
  SELMATCH_HD void activate(int64_t image, int64_t piece, const T* n, const T* nt, int column) const {
    constexpr int kWindow = kPool == kBlockNoPool ? 1 : 4;
    Words bits = {};
    int64_t out = piece * (kPixels / kWindow);
    T *y = call.y + (image * outs + out) * outputs + column, *yt = kDual ? y - call.y + call.yt : nullptr;
    for (int first = 0; first < kPixels && out < outs; first += kWindow, ++out, y += outputs) {
      Lanes value[kWindow], tangent[kWindow];
      for (int k = 0; k < kWindow; ++k) {
        value[k] = Products::load(n + (first + k) * kColumns);
        tangent[k] = kDual ? Products::load(nt + (first + k) * kColumns) : Lanes{};
      }
      Products::store(pooled<kPool>(value, tangent, kFirst >> first, bits), y);
      if (kDual) {
        Products::store(tangent[0], yt);
        yt += outputs;
      }
    }
    std::memcpy(call.bits + (image * pieces + piece) * outputs + column, &bits, sizeof(bits));
  }

  // A window's result; that of its tangents into the first of them, and its bits, from `bit` on.
  template <int kPool>
  SELMATCH_HD Lanes pooled(const Lanes* n, Lanes* nt, Word bit, Words& bits) const {
    constexpr int kWindow = kPool == kBlockNoPool ? 1 : 4;
    const Lanes zero = {}, below = zero + call.slope;
    if constexpr (kPool == kBlockMaxPool) {
      Lanes best = n[0], best_t = nt[0], spoilt = n[0];
      Words which = Words{} + bit;
      for (int k = 1; k < kWindow; ++k) {
        const auto higher = n[k] > best;
        best = higher ? n[k] : best;
        best_t = higher ? nt[k] : best_t;
        which = higher ? Words{} + (bit >> k) : which;
        spoilt += n[k] == n[k] ? zero : n[k];
      }
      best = spoilt == spoilt ? best : spoilt;  // NaN anywhere, as in torch
      bits |= best > zero ? which : Words{};
      nt[0] = best > zero ? best_t : zero;
      return best > zero ? best : below * best;
    }
    Lanes sum = {}, sum_t = {};
    for (int k = 0; k < kWindow; ++k) {
      bits |= n[k] > zero ? Words{} + (bit >> k) : Words{};
      sum += n[k] > zero ? n[k] : below * n[k];
      sum_t += n[k] > zero ? nt[k] : below * nt[k];
    }
    nt[0] = sum_t * T(1.0 / kWindow);
    return sum * T(1.0 / kWindow);
  }

  // --- back ----------------------------------------------------------------------------------------------------------

  // a = act'(n) unpool(g) of a piece and `count` outputs, (kPixels, count); 0 of pixels that are in no window.
  void slopes(int64_t image, int64_t piece, const T* g, int column, int count, T* to) const {
    const Word* word = call.bits + (image * pieces + piece) * outputs + column;
    const int64_t first = piece * kPixels / window, windows = std::clamp<int64_t>(outs - first, 0, kPixels / window);
    const T share = call.pool == kBlockAveragePool ? T(0.25) : T(1);
    for (int c = 0; c < count; c += kLanes) {
      const T* from = g + (image * outs + first) * outputs + column + c;
      T* at = to + c;
      Words bits = {};
      if (windows > 0) {
        std::memcpy(&bits, word + c, sizeof(bits));
      }
      for (int64_t w = 0; w < windows; ++w, from += outputs) {
        const Lanes above = share * Products::load(from), below = call.slope * above;
        for (int k = 0; k < window; ++k, at += count) {
          Products::store(reinterpret_cast<Signs>(bits) < 0 ? above : below, at);
          bits += bits;
        }
      }
      for (int64_t p = windows * window; p < kPixels; ++p, at += count) {
        Products::store(Lanes{}, at);
      }
    }
  }

  // Adds a piece's part of G to sum.
  void add_products(int64_t image, int64_t piece, const T* g, Thread& thread, T* sum) const {
    for (int column = 0; column < outputs; column += kColumns) {
      slopes(image, piece, g, column, kColumns, thread.left);
      Products::multiply({thread.around, 1, kRows}, kRows, thread.left, kColumns, kPixels, sum + column, outputs, true);
    }
  }

  // Of shares: G and Gt, or the gradients of images that have matrices of their own.
  void backward(int64_t begin, int64_t end) {
    Thread thread(*this);
    for_images(begin, end, [&](int64_t n, double* total) {
      set_image(n, thread.image);
      double* to = per_image ? thread.exact_sum : total;
      if (per_image) {
        std::fill_n(to, back_size, 0.0);
      }
      for (int64_t first = 0; first < pieces; first += kPieces) {
        std::fill_n(thread.sum + 0, back_size, T(0));
        for (int64_t piece = first; piece < std::min(first + kPieces, pieces); ++piece) {
          gather<kRows>(thread.image, piece * kPixels, thread.around + 0);
          add_products(n, piece, call.g, thread, thread.sum);
          if (call.gt != nullptr) {
            add_products(n, piece, call.gt, thread, thread.sum + size);
          }
        }
        for (int64_t k = 0; k < back_size; ++k) {
          to[k] += thread.sum[k];
        }
      }
      if (per_image) {
        add_gradients(thread.exact_sum, n, *thread.matrices, total, thread.factors);
        spread_image(n, thread, thread.factors);
      }
    });
  }

  // Adds the gradients of row `row` of statistics, from its G and Gt: those of the weight, then of gamma and beta.
  void add_gradients(const double* g, int64_t row, Matrices& matrices, double* to, Factors& given) const {
    matrices.set_moments(call.moments + row * kLength * kLength);
    if (call.gt == nullptr) {
      return matrices.add_gradients(g, to, to + size, to + size + outputs);
    }
    matrices.add_gradients(g, g + size, to, to + size, to + size + outputs);
    matrices.set_given(given.by_a, given.by_at, given.by_p, kGiven);
  }

  void spread(int64_t begin, int64_t end) {
    Thread thread(*this);
    for (int64_t n = begin; n < end; ++n) {
      set_image(n, thread.image);
      spread_image(n, thread, factors);
    }
  }

  // The tangent of image n's gradient.
  void spread_image(int64_t n, Thread& thread, const Factors& by) const {
    if (call.x_grad_t == nullptr) {
      return;
    }
    std::fill_n(thread.result + 0, bordered, T(0));
    for (int64_t first = 0; first < pixels; first += kPixels) {
      gather<kRows>(thread.image, first, thread.around + 0);
      slopes(n, first / kPixels, call.g, 0, outputs, thread.a);
      give(thread.a, outputs, outputs, by.by_a, thread.given, false);
      slopes(n, first / kPixels, call.gt, 0, outputs, thread.a);
      give(thread.a, outputs, outputs, by.by_at, thread.given, true);
      if (call.norm != kBlockNoNorm) {  // else by_p is 0, and 0 times infinity is not
        give(thread.around, kRows, kLength, by.by_p, thread.given, true);
      }
      add_given(thread.given, first, thread.result);
    }
    const int64_t row = static_cast<int64_t>(call.width) * kChannels;
    T* to = call.x_grad_t + n * pixels * kChannels;
    for (int i = 0; i < call.height; ++i) {
      std::copy_n(thread.result + (i + 1) * (row + 2 * kChannels) + kChannels, row, to + i * row);
    }
  }

  // given = (or +=) a matrix, a: (kPixels, count)
  void give(const T* a, int stride, int count, const T* matrix, T* given, bool add) const {
    for (int column = 0; column < kGiven; column += kColumns) {
      Products::multiply({a, stride, 1}, kPixels, matrix + column, kGiven, count, given + column, kGiven, add);
    }
  }

  // Adds what pixels give to where it belongs.
  void add_given(const T* given, int64_t first, T* result) const {
    const int64_t row = (call.width + int64_t{2}) * kChannels, end = std::min(first + kPixels, pixels);
    for (int64_t p = first; p < end; ++p, given += kGiven) {
      T* to = result + places[p];
      for (int i = 0; i < 3; ++i, to += row) {
#pragma GCC unroll 12
        for (int k = 0; k < 3 * kChannels; ++k) {
          to[k] += given[3 * kChannels * i + k];
        }
      }
    }
  }

  // --- one pass ------------------------------------------------------------------------------------------------------

  template <bool kDual>
  void run_forward() {
    if (call.norm == kBlockBatchNorm) {
      Products::template over<&ConvBlockLoops::batch_moments>(*this, parallel, shares);
      add_shares();
    }
    if (!per_image) {
      Matrices matrices(call);
      set_matrices(sums, 0, matrices, factors);
    }
    switch (call.pool) {
      case kBlockNoPool:
        return Products::template over<&ConvBlockLoops::forward<kDual, kBlockNoPool>>(*this, parallel, call.batch);
      case kBlockAveragePool:
        return Products::template over<&ConvBlockLoops::forward<kDual, kBlockAveragePool>>(*this, parallel, call.batch);
      default:
        return Products::template over<&ConvBlockLoops::forward<kDual, kBlockMaxPool>>(*this, parallel, call.batch);
    }
  }

  void run_backward() {
    Products::template over<&ConvBlockLoops::backward>(*this, parallel, shares);
    add_shares();
    Memory<double> total{size + 2 * outputs, 0.0};
    if (!per_image) {
      Matrices matrices(call);
      add_gradients(sums, 0, matrices, total, factors);
      Products::template over<&ConvBlockLoops::spread>(*this, parallel, call.x_grad_t == nullptr ? 0 : call.batch);
    }
    const double* found = per_image ? sums : total;
    for (int k = 0; k < outputs; ++k) {
      for (int c = 0; c < kChannels; ++c) {
        for (int j = 0; j < 9; ++j) {
          call.weight_grad[(k * kChannels + c) * 9 + j] = static_cast<T>(found[(j * kChannels + c) * outputs + k]);
        }
      }
      if (call.norm != kBlockNoNorm) {
        call.gamma_grad[k] = static_cast<T>(found[size + k]);
        call.beta_grad[k] = static_cast<T>(found[size + outputs + k]);
      }
    }
  }
};

template <typename T, int kChannels>
void run_of(const ConvBlockCall<T>& call, int pass, CpuParallel parallel) {
  ConvBlockLoops<T, kChannels> loops{call, parallel};
  switch (pass) {
    case kBlockForward:
      return loops.template run_forward<false>();
    case kBlockDualForward:
      return loops.template run_forward<true>();
    default:
      return loops.run_backward();
  }
}

template <typename T>
void run(const ConvBlockCall<T>& call, int pass, CpuParallel parallel) {
  with_few(call.channels, [&](auto few) { run_of<T, few>(call, pass, parallel); });
}
