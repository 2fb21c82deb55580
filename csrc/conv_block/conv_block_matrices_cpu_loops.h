// The matrices of a first layer, for one row of statistics after the other, in double. conv_block_cpu_loops.h includes
// this once for each set of vector instructions. They have a row for each number of P and a column for each output,
// where nothing else is said; what is there for each output alone is a row of numbers.

#include "cpu_products_loops.h"

template <typename T>
struct ConvBlockMatrices {
  using Products = CpuProducts<double>;

  const ConvBlockCall<T>& call;
  const int outputs = call.outputs, length = 9 * call.channels + 1;
  const int rows = Products::up_to(length, Products::kFewRows),
            columns = Products::up_to(length, Products::kColumns);  // of products
  const int64_t size = static_cast<int64_t>(rows) * outputs, across = static_cast<int64_t>(outputs) * columns;
  const int64_t side = static_cast<int64_t>(rows) * columns;

  double count = 1;                                                       // of pixels
  Memory<double> m{side, 0.0}, covariance{side, 0.0};                     // M; that of P. Both (rows, columns)
  Memory<double> means{columns};                                          // of P, (length)
  Memory<double> w{size, 0.0}, w_t{size, 0.0};                            // W
  Memory<double> w_transposed{across, 0.0}, w_t_transposed{across, 0.0};  // its transpose, (outputs, columns)
  Memory<double> covariance_w{size};                                      // the covariance of P times W
  Memory<double> h{size, 0.0}, h_t{size, 0.0};                            // H
  Memory<double> v{size, 0.0}, v_t{size, 0.0}, mv{size};  // V, of g_z_t in place of V, M times one of them
  Memory<double> gamma{outputs}, beta{outputs}, gamma_t{outputs}, beta_t{outputs};
  Memory<double> mean{outputs}, offset{outputs};  // the norm's mean, and how far that of an output is from it
  Memory<double> r{outputs}, s{outputs};          // r, and m(zh zt)
  Memory<double> of_a{outputs}, of_at{outputs};   // g_z_t = of_a a + of_at at - ...
  Memory<double> q{outputs}, qz{outputs}, q_t{outputs}, qz_t{outputs};  // the means of the backward pass

  explicit ConvBlockMatrices(const ConvBlockCall<T>& call_) : call(call_) {
    set_weight(call.weight, w, w_transposed);
    set_row(call.gamma, 1, gamma);
    set_row(call.beta, 0, beta);
    if (call.weight_t != nullptr) {
      set_weight(call.weight_t, w_t, w_t_transposed);
      set_row(call.gamma_t, 0, gamma_t);
      set_row(call.beta_t, 0, beta_t);
    }
  }

  void set_weight(const T* weight, double* to, double* transposed) const {
    for (int k = 0; k < outputs; ++k) {
      for (int c = 0; c < call.channels; ++c) {
        for (int j = 0; j < 9; ++j) {
          const int l = j * call.channels + c;
          to[l * outputs + k] = transposed[k * columns + l] = *weight++;
        }
      }
    }
  }
  void set_row(const T* from, double otherwise, double* to) const {
    for (int k = 0; k < outputs; ++k) {
      to[k] = from == nullptr ? otherwise : from[k];
    }
  }

  // --- what several of them need -------------------------------------------------------------------------------------

  // to[l, k] = value(number of [l, k], k), to which the row of P's 1 adds ones(k)
  template <typename To, typename Value, typename Ones>
  void fill(To* to, const Value& value, const Ones& ones) const {
    for (int l = 0; l + 1 < length; ++l) {
#pragma GCC ivdep
      for (int k = 0; k < outputs; ++k) {
        to[l * outputs + k] = static_cast<To>(value(l * outputs + k, k));
      }
    }
    for (int k = 0, i = (length - 1) * outputs; k < outputs; ++k, ++i) {
      to[i] = static_cast<To>(value(i, k) + ones(k));
    }
  }

  // to[k] = sum over l of value(l, number of [l, k])
  template <typename Value>
  void add_up(double* to, const Value& value) const {
    std::fill_n(to, outputs, 0.0);
    for (int l = 0; l < length; ++l) {
#pragma GCC ivdep
      for (int k = 0; k < outputs; ++k) {
        to[k] += value(l, l * outputs + k);
      }
    }
  }

  // Makes the numbers of outputs their means over the outputs that the norm takes together, divided by `by`.
  void over_group(double* numbers, double by) const {
    const int together = call.norm == kBlockSampleNorm ? outputs / call.groups : 1;
    for (int first = 0; first < outputs; first += together) {
      const double sum = std::accumulate(numbers + first, numbers + first + together, 0.0);
      std::fill_n(numbers + first, together, sum / (together * by));
    }
  }

  // to = a matrix; a: (rows, columns), of which `length` columns count
  void multiply(const double* a, const double* matrix, double* to) const {
    for (int k = 0; k < outputs; k += Products::kColumns) {
      Products::multiply({a, columns, 1}, rows, matrix + k, outputs, length, to + k, outputs, false);
    }
  }

  // The norm's mean of matrix^T P, and how far that of each output is from it.
  void set_means(const double* matrix, double* norm, double* rest) const {
    add_up(rest, [&](int l, int i) { return means[l] * matrix[i]; });
    std::copy_n(rest, outputs, norm);
    over_group(norm, 1);
    for (int k = 0; k < outputs; ++k) {
      rest[k] -= norm[k];
    }
  }

  // --- forward -------------------------------------------------------------------------------------------------------

  // H from M, (length, length), and the tangent's; without a norm H is W.
  void set_moments(const double* moments) {
    if (call.norm == kBlockNoNorm) {
      std::fill_n(r + 0, outputs, 1.0);
      std::fill_n(s + 0, outputs, 0.0);
      std::fill_n(mean + 0, outputs, 0.0);
      std::copy_n(w + 0, size, h + 0);
      std::copy_n(w_t + 0, size, h_t + 0);
      return;
    }
    const double* sums = moments + static_cast<int64_t>(length - 1) * length;
    count = sums[length - 1];
    for (int l = 0; l < length; ++l) {
      means[l] = sums[l] / count;
      std::copy_n(moments + l * length, length, m + l * columns);
    }
    for (int l = 0; l < length; ++l) {
      for (int j = 0; j < length; ++j) {
        covariance[l * columns + j] = m[l * columns + j] / count - means[l] * means[j];
      }
    }
    multiply(covariance, w, covariance_w);
    set_means(w, mean, offset);
    add_up(r, [&](int, int i) { return w[i] * covariance_w[i]; });
    for (int k = 0; k < outputs; ++k) {
      r[k] += offset[k] * offset[k];
    }
    over_group(r, 1);
    for (int k = 0; k < outputs; ++k) {
      r[k] = 1 / std::sqrt(std::max(r[k], 0.0) + call.eps);
    }
    fill(h + 0, [&](int i, int k) { return r[k] * w[i]; }, [&](int k) { return -r[k] * mean[k]; });
    if (call.weight_t != nullptr) {
      set_tangent();
    }
  }

  void set_tangent() {
    set_means(w_t, q, qz);  // of zt
    add_up(s, [&](int, int i) { return w_t[i] * covariance_w[i]; });
    for (int k = 0; k < outputs; ++k) {
      s[k] += offset[k] * qz[k];
    }
    over_group(s, 1);
    for (int k = 0; k < outputs; ++k) {
      s[k] *= r[k];
    }
    fill(h_t + 0, [&](int i, int k) { return r[k] * (w_t[i] - s[k] * h[i]); }, [&](int k) { return -r[k] * q[k]; });
  }

  void set_n(T* n) const {
    fill(n, [&](int i, int k) { return gamma[k] * h[i]; }, [&](int k) { return beta[k]; });
  }
  void set_n_t(T* n_t) const {
    fill(n_t, [&](int i, int k) { return gamma_t[k] * h[i] + gamma[k] * h_t[i]; }, [&](int k) { return beta_t[k]; });
  }

  // --- back ----------------------------------------------------------------------------------------------------------

  // V, from G; and adds to the gradients of W, gamma and beta.
  void add_gradients(const double* g, double* weight, double* of_gamma, double* of_beta) {
    const double* ones = g + static_cast<int64_t>(length - 1) * outputs;
    add_up(qz, [&](int, int i) { return h[i] * g[i]; });
    for (int k = 0; k < outputs; ++k) {
      of_gamma[k] += qz[k];
      of_beta[k] += ones[k];
    }
    set_v(ones);
    multiply(m, v, mv);
    fill(weight, [&](int i, int k) { return weight[i] + r[k] * (gamma[k] * g[i] - mv[i]); }, [](int) { return 0; });
  }

  // qz: m(a zh) times `count`, before it is averaged; ones: sums of a
  void set_v(const double* ones) {
    if (call.norm == kBlockNoNorm) {
      return;
    }
    for (int k = 0; k < outputs; ++k) {
      q[k] = gamma[k] * ones[k];
      qz[k] *= gamma[k];
    }
    over_group(q, count);
    over_group(qz, count);
    fill(v + 0, [&](int i, int k) { return qz[k] * h[i]; }, [&](int k) { return q[k]; });
  }

  // The same of the tangents: g_z_t = of_a a + of_at at - V_t^T P.
  void add_gradients(const double* g, const double* gt, double* weight_t, double* of_gamma_t, double* of_beta_t) {
    const int64_t last = static_cast<int64_t>(length - 1) * outputs;
    add_up(qz, [&](int, int i) { return h[i] * g[i]; });
    add_up(qz_t, [&](int, int i) { return h[i] * gt[i] + h_t[i] * g[i]; });
    for (int k = 0; k < outputs; ++k) {
      of_gamma_t[k] += qz_t[k];
      of_beta_t[k] += gt[last + k];
      q_t[k] = gamma_t[k] * g[last + k] + gamma[k] * gt[last + k];
      qz_t[k] = gamma_t[k] * qz[k] + gamma[k] * qz_t[k];
      of_at[k] = r[k] * gamma[k];
      of_a[k] = r[k] * (gamma_t[k] - s[k] * of_at[k]);
    }
    set_v(g + last);
    if (call.norm != kBlockNoNorm) {
      over_group(q_t, count);
      over_group(qz_t, count);
      fill(
          v_t + 0, [&](int i, int k) { return r[k] * (qz[k] * h_t[i] + qz_t[k] * h[i] - r[k] * s[k] * v[i]); },
          [&](int k) { return r[k] * q_t[k]; });
    }
    multiply(m, v_t, mv);
    fill(
        weight_t, [&](int i, int k) { return weight_t[i] + of_a[k] * g[i] + of_at[k] * gt[i] - mv[i]; },
        [](int) { return 0; });
  }

  // What a pixel gives to the tangent of the images' gradient, at its patch: a by the first matrix, at by the
  // second, (outputs, stride), and P by the third, (length, stride).
  void set_given(T* by_a, T* by_at, T* by_p, int stride) {
    for (int k = 0; k < outputs; ++k) {
      const double own = of_a[k], other = of_at[k];
      for (int l = 0; l + 1 < length; ++l) {
        const double number = w_transposed[k * columns + l];
        by_a[k * stride + l] = static_cast<T>(own * number + other * w_t_transposed[k * columns + l]);
        by_at[k * stride + l] = static_cast<T>(other * number);
      }
    }
    fill(v + 0, [&](int i, int k) { return r[k] * v[i]; }, [](int) { return 0; });
    for (int l = 0; l < columns; l += Products::kColumns) {
      Products::multiply({v_t, outputs, 1}, rows, w_transposed + l, columns, outputs, covariance + l, columns, false);
      Products::multiply({v, outputs, 1}, rows, w_t_transposed + l, columns, outputs, covariance + l, columns, true);
    }
    for (int l = 0; l < length; ++l) {
      for (int j = 0; j + 1 < length; ++j) {
        by_p[l * stride + j] = static_cast<T>(-covariance[l * columns + j]);
      }
    }
  }
};
