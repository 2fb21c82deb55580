// The mathematics of a block at one pixel, for V = a number or a vector of numbers of type T. There is no include
// guard: block_cpu_type.h includes it once for each set of vector instructions, block_cuda.h once. exp_of(V) must
// have been declared before.

template <typename V>
struct BlockCurve {  // an activation's value, slope and curvature
  V value, first, second;
};

template <typename T>
struct PiecewiseActivation {
  static constexpr bool kIsCurved = false;
  T slope;

  explicit SELMATCH_HD PiecewiseActivation(const BlockCall& call) : slope(static_cast<T>(call.slope)) {}

  template <typename V>
  SELMATCH_HD BlockCurve<V> operator()(V n) const {
    const V zero = {}, one = zero + T(1), below = zero + slope;
    return {n > zero ? n : below * n, n > zero ? one : below, zero};
  }
};

template <typename T>
struct SmoothActivation {  // sigmoid, or swish: n sigmoid(n)
  static constexpr bool kIsCurved = true;
  bool swish;

  explicit SELMATCH_HD SmoothActivation(const BlockCall& call) : swish(call.activation == kBlockSwish) {}

  template <typename V>
  SELMATCH_HD BlockCurve<V> operator()(V n) const {
    const V s = T(1) / (T(1) + exp_of(-n)), d = s * (T(1) - s), turn = T(1) - T(2) * s;
    if (swish) {
      return {n * s, s + n * d, d * (T(2) + n * turn)};
    }
    return {s, d, d * turn};
  }
};

template <typename V>
struct BlockParameters {  // of one channel, or of one channel at one pixel
  V gamma, beta, gamma_t, beta_t;
};

template <typename V>
struct BlockChannel {  // statistics: mean, r, m(zt), s
  V mean, scale, mean_t, product;
};

template <typename V>
struct BlockPoint {
  V zh, n, zht, nt;
};

template <typename V>
SELMATCH_HD BlockPoint<V> block_point(const BlockChannel<V>& c, const BlockParameters<V>& p, V z) {
  const V zh = (z - c.mean) * c.scale;
  return {zh, p.gamma * zh + p.beta, zh, zh};
}

template <typename V>
SELMATCH_HD BlockPoint<V> block_dual_point(const BlockChannel<V>& c, const BlockParameters<V>& p, V z, V zt) {
  const V zh = (z - c.mean) * c.scale;
  const V zht = c.scale * (zt - c.mean_t - zh * c.product);
  return {zh, p.gamma * zh + p.beta, zht, p.gamma_t * zh + p.gamma * zht + p.beta_t};
}

template <typename V>
struct BlockBackMeans {  // m(q), m(q zh), m(qt), m(qt zh + q zht)
  V q, qz, qt, qzt;
};

template <typename V>
SELMATCH_HD V block_gz(const BlockChannel<V>& c, const BlockBackMeans<V>& m, V zh, V q) {
  return c.scale * (q - m.q - zh * m.qz);
}

template <typename V>
SELMATCH_HD V block_gzt(const BlockChannel<V>& c, const BlockBackMeans<V>& m, const BlockPoint<V>& at, V qt, V gz) {
  return c.scale * (qt - m.qt - at.zht * m.qz - at.zh * m.qzt - c.product * gz);
}
