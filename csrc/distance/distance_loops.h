// The CPU's loops over a part of a piece. They need nothing of torch, so the kernel emulation test uses them as well.
#pragma once

#ifdef __SSE2__
#include <emmintrin.h>
#endif

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

// student_grad = weight (student - target), past the caches, where a line that is to be overwritten would first
// be read. The gradient is a fresh tensor and `begin` the beginning of a chunk, so that both are aligned.
template <typename T>
void stream_student_gradient(const DistancePiece<T>& piece, int64_t begin, int64_t end, T weight) {
  int64_t i = begin;
#ifdef __SSE2__
  typedef T Lanes __attribute__((vector_size(16), aligned(sizeof(T))));
  constexpr int kLanes = 16 / sizeof(T);
  for (; i + kLanes <= end; i += kLanes) {
    const Lanes student = *reinterpret_cast<const Lanes*>(piece.student + i);
    const Lanes target = *reinterpret_cast<const Lanes*>(piece.target + i);
    const Lanes gradient = weight * (student - target);
    _mm_stream_si128(reinterpret_cast<__m128i*>(piece.student_grad + i), reinterpret_cast<__m128i>(gradient));
  }
  _mm_sfence();
#endif
  for (; i < end; ++i) {
    piece.student_grad[i] = weight * (piece.student[i] - piece.target[i]);
  }
}

// The common case has loops of its own, which vectorise. streamed: the gradients are larger than the caches.
template <typename T>
void distance_gradient(const DistancePiece<T>& piece, int64_t begin, int64_t end, DistanceWeights<T> weights,
                       bool streamed) {
  if (piece.start_grad == nullptr && piece.target_grad == nullptr) {
    if (streamed) {
      return stream_student_gradient(piece, begin, end, weights.student);
    }
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
