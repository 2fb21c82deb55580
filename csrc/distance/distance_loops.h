// The CPU's loops over a part of a piece. They need nothing of torch, so the kernel emulation test uses them as well.
#pragma once

#include "distance/distance.h"

// The widest vectors that the machine has, chosen when the library is loaded (ThreadSanitizer starts too late for
// that).
#if defined(__x86_64__) && defined(__has_attribute) && !defined(__SANITIZE_THREAD__)
#if __has_attribute(target_clones)
#define SELMATCH_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#endif
#ifndef SELMATCH_CLONES
#define SELMATCH_CLONES
#endif

namespace selmatch {

constexpr int kDistanceLanes = 8;
typedef double DistanceLanes __attribute__((vector_size(kDistanceLanes * sizeof(double))));

// sum += (a - b)^2, 8 elements of each
template <typename T>
SELMATCH_HD void add_squared_differences(const T* a, const T* b, DistanceLanes* sum) {
  typedef T Lanes __attribute__((vector_size(kDistanceLanes * sizeof(T))));
  Lanes x, y;
  std::memcpy(&x, a, sizeof(Lanes));
  std::memcpy(&y, b, sizeof(Lanes));
  const DistanceLanes difference = __builtin_convertvector(x - y, DistanceLanes);
  *sum += difference * difference;
}

// The lanes are added in one order, whatever the width of the machine's vectors.
template <typename T>
SELMATCH_HD DistanceSums distance_sums_loop(const T* student, const T* start, const T* target, int64_t size) {
  constexpr int kStep = 2 * kDistanceLanes;  // two sums of each, since an addition takes several cycles
  DistanceLanes numerator[2] = {};
  DistanceLanes denominator[2] = {};
  int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    for (int half = 0; half < 2; ++half) {
      const int64_t at = i + half * kDistanceLanes;
      add_squared_differences(student + at, target + at, &numerator[half]);
      add_squared_differences(start + at, target + at, &denominator[half]);
    }
  }
  DistanceSums sums = {0, 0};
  for (; i < size; ++i) {
    sums.numerator += squared_difference(student[i], target[i]);
    sums.denominator += squared_difference(start[i], target[i]);
  }
  for (int lane = 0; lane < kDistanceLanes; ++lane) {
    sums.numerator += numerator[0][lane] + numerator[1][lane];
    sums.denominator += denominator[0][lane] + denominator[1][lane];
  }
  return sums;
}

SELMATCH_CLONES inline DistanceSums distance_sums(const float* student, const float* start, const float* target,
                                                  int64_t size) {
  return distance_sums_loop(student, start, target, size);
}

SELMATCH_CLONES inline DistanceSums distance_sums(const double* student, const double* start, const double* target,
                                                  int64_t size) {
  return distance_sums_loop(student, start, target, size);
}

// The common case has a loop of its own, which vectorises.
template <typename T>
void distance_gradient(const DistancePiece<T>& piece, int64_t begin, int64_t end, DistanceWeights<T> weights) {
  if (piece.start_grad == nullptr && piece.target_grad == nullptr) {
    for (int64_t i = begin; i < end; ++i) {
      piece.student_grad[i] = weights.student * (piece.student[i] - piece.target[i]);
    }
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    distance_gradient_at(piece, i, weights);
  }
}

}  // namespace selmatch
