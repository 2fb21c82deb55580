// The sums of the gradient distance. gradient_distance_cpu_loops.cpp includes this once for each set of vector
// instructions, in a namespace of its own, so there is no include guard.

constexpr int kLanes = 8;  // whatever the width of the machine's vectors: it is the order of the additions
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));

template <typename T>
GradientSums sums(int metric, const T* syn, const T* real, int64_t size) {
  typedef T Items __attribute__((vector_size(kLanes * sizeof(T))));
  Lanes dots = {}, syns = {}, reals = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    Items x, y;
    std::memcpy(&x, syn + i, sizeof(Items));
    std::memcpy(&y, real + i, sizeof(Items));
    const Lanes a = __builtin_convertvector(x, Lanes);
    const Lanes b = __builtin_convertvector(y, Lanes);
    if (metric == kMse) {
      dots += (a - b) * (a - b);
    } else {
      dots += a * b;
      syns += a * a;
      reals += b * b;
    }
  }
  GradientSums result = {0, 0, 0};
  for (; i < size; ++i) {
    add_gradient_sums(metric, syn[i], real[i], &result);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    result.dot += dots[lane];
    result.syn += syns[lane];
    result.real += reals[lane];
  }
  return result;
}
