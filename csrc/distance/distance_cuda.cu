// The trajectory distance on the GPU: one block adds up one chunk, one more block adds the chunks in order (no atomics,
// so the same bits every time); the gradient is one pass. A list travels as a table in the kernel's arguments, so no
// memory is copied and one launch serves up to kTableSize tensors.
#include "distance/distance.h"

namespace selmatch {
namespace {

constexpr int kTableSize = 60;  // a kernel's arguments have 4 KB

template <typename T>
struct DistanceTable {
  DistancePiece<T> pieces[kTableSize];
  int32_t first_chunk[kTableSize + 1];
  int32_t count;
};

static_assert(sizeof(DistanceTable<double>) + 64 <= 4096, "the table must fit a kernel's arguments");

// Calls launch_part(table, chunks before it) for as many tables as the pieces need.
template <typename T, typename Launch>
void for_each_table(const std::vector<DistancePiece<T>>& pieces, Launch launch_part) {
  int64_t before = 0;
  for (size_t begin = 0; begin < pieces.size(); begin += kTableSize) {
    DistanceTable<T> table = {};
    table.count = static_cast<int32_t>(pieces.size() - begin < kTableSize ? pieces.size() - begin : kTableSize);
    for (int i = 0; i < table.count; ++i) {
      table.pieces[i] = pieces[begin + i];
      table.first_chunk[i + 1] = table.first_chunk[i] + static_cast<int32_t>(distance_chunks(pieces[begin + i].size));
    }
    launch_part(table, before);
    before += table.first_chunk[table.count];
  }
}

// The part of a piece that this block works on.
struct Range {
  int piece;
  int64_t begin;
  int64_t end;
};

template <typename T>
SELMATCH_DEVICE Range block_range(const DistanceTable<T>& table) {
  const int chunk = static_cast<int>(blockIdx.x);
  int piece = 0;
  while (table.first_chunk[piece + 1] <= chunk) {
    ++piece;
  }
  const int64_t begin = (chunk - table.first_chunk[piece]) * kDistanceChunk;
  const int64_t rest = table.pieces[piece].size - begin;
  return {piece, begin, begin + (rest < kDistanceChunk ? rest : kDistanceChunk)};
}

// partials: (chunks, 2)
template <typename T>
SELMATCH_KERNEL distance_chunk_kernel(const DistanceTable<T> table, double* partials) {
  const Range range = block_range(table);
  const DistancePiece<T>& piece = table.pieces[range.piece];
  double numerator = 0;
  double denominator = 0;
  for (int64_t i = range.begin + threadIdx.x; i < range.end; i += blockDim.x) {
    const T target = piece.target[i];
    numerator += squared_difference(piece.student[i], target);
    denominator += squared_difference(piece.start[i], target);
  }
  numerator = block_sum(numerator);
  denominator = block_sum(denominator);
  if (threadIdx.x == 0) {
    partials[2 * blockIdx.x] = numerator;
    partials[2 * blockIdx.x + 1] = denominator;
  }
}

template <typename T>
SELMATCH_KERNEL distance_total_kernel(const double* partials, int64_t chunks, T* value, double* sums) {
  double numerator = 0;
  double denominator = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += blockDim.x) {
    numerator += partials[2 * i];
    denominator += partials[2 * i + 1];
  }
  numerator = block_sum(numerator);
  denominator = block_sum(denominator);
  if (threadIdx.x == 0) {
    sums[0] = numerator;
    sums[1] = denominator;
    *value = static_cast<T>(numerator / denominator);
  }
}

template <typename T>
SELMATCH_KERNEL distance_gradient_kernel(const DistanceTable<T> table, const T* grad, const double* sums) {
  const Range range = block_range(table);
  const DistanceWeights<T> weights = distance_weights<T>(*grad, sums[0], sums[1]);
  const DistancePiece<T> piece = table.pieces[range.piece];
  for (int64_t i = range.begin + threadIdx.x; i < range.end; i += blockDim.x) {
    distance_gradient_at(piece, i, weights);
  }
}

}  // namespace

template <typename T>
void distance_cuda(const std::vector<DistancePiece<T>>& pieces, double* partials, T* value, double* sums,
                   void* stream) {
  for_each_table<T>(pieces, [&](const DistanceTable<T>& table, int64_t before) {
    launch(distance_chunk_kernel<T>, table.first_chunk[table.count], kBlockThreads, 0, stream, table,
           partials + 2 * before);
  });
  const double* all_partials = partials;
  launch(distance_total_kernel<T>, 1, kBlockThreads, 0, stream, all_partials, distance_chunks(pieces), value, sums);
}

template <typename T>
void distance_gradient_cuda(const std::vector<DistancePiece<T>>& pieces, const T* grad, const double* sums,
                            void* stream) {
  for_each_table<T>(pieces, [&](const DistanceTable<T>& table, int64_t) {
    launch(distance_gradient_kernel<T>, table.first_chunk[table.count], kBlockThreads, 0, stream, table, grad, sums);
  });
}

template void distance_cuda(const std::vector<DistancePiece<float>>&, double*, float*, double*, void*);
template void distance_cuda(const std::vector<DistancePiece<double>>&, double*, double*, double*, void*);
template void distance_gradient_cuda(const std::vector<DistancePiece<float>>&, const float*, const double*, void*);
template void distance_gradient_cuda(const std::vector<DistancePiece<double>>&, const double*, const double*, void*);

}  // namespace selmatch
