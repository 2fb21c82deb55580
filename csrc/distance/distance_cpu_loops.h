// The sums of the trajectory distance. distance_cpu_loops.cpp includes this once for each set of vector instructions,
// in a namespace of its own, so there is no include guard.

constexpr int kLanes = 8;  // whatever the width of the machine's vectors: it is the order of the additions
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));

// sum += (a - b)^2, 8 elements of each
template <typename T>
SELMATCH_HD void add_squared_differences(const T* a, const T* b, Lanes* sum) {
  typedef T Items __attribute__((vector_size(kLanes * sizeof(T))));
  Items x, y;
  std::memcpy(&x, a, sizeof(Items));
  std::memcpy(&y, b, sizeof(Items));
  const Lanes difference = __builtin_convertvector(x - y, Lanes);
  *sum += difference * difference;
}

template <typename T>
DistanceSums sums(const T* student, const T* start, const T* target, int64_t size) {
  constexpr int kStep = 2 * kLanes;  // two sums of each, since an addition takes several cycles
  Lanes numerator[2] = {};
  Lanes denominator[2] = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i + half * kLanes;
      add_squared_differences(student + at, target + at, &numerator[half]);
      add_squared_differences(start + at, target + at, &denominator[half]);
    }
  }
  DistanceSums result = {0, 0};
  for (; i < size; ++i) {
    result.numerator += squared_difference(student[i], target[i]);
    result.denominator += squared_difference(start[i], target[i]);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    result.numerator += numerator[0][lane] + numerator[1][lane];
    result.denominator += denominator[0][lane] + denominator[1][lane];
  }
  return result;
}
