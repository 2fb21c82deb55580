// Lists of tensors that lie anywhere in memory, worked on row by row. A piece is one tensor of each list as flat
// memory; it has rows(), length() of a row, and size, the number of its elements: the last row may be shorter. A row is
// what a thread of the CPU or a block of the GPU adds up, the same whatever their number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "platform.h"

namespace selmatch {

// One row: elements begin to end - 1 of a piece.
struct Part {
  int piece;
  int64_t begin, end;
};

template <typename P>
SELMATCH_HD Part part_of(const P& piece, int index, int64_t row) {
  const int64_t begin = row * piece.length(), rest = piece.size - begin;
  return {index, begin, begin + (rest < piece.length() ? rest : piece.length())};
}

template <typename P>
int64_t count_rows(const std::vector<P>& pieces) {
  int64_t rows = 0;
  for (const P& piece : pieces) {
    rows += piece.rows();
  }
  return rows;
}

// All rows, in order.
template <typename P>
std::vector<Part> cut(const std::vector<P>& pieces) {
  std::vector<Part> parts;
  parts.reserve(count_rows(pieces));
  for (size_t piece = 0; piece < pieces.size(); ++piece) {
    for (int64_t row = 0; row < pieces[piece].rows(); ++row) {
      parts.push_back(part_of(pieces[piece], static_cast<int>(piece), row));
    }
  }
  return parts;
}

#if defined(__CUDACC__) || defined(SELMATCH_EMULATE)

// Pieces as a kernel's argument, so that no memory is copied; a block takes a row.
template <typename P>
struct PieceTable {
  static constexpr int kSize = 60;  // a kernel's arguments have 4 KB
  P pieces[kSize];
  int32_t first[kSize + 1];  // row of each piece
  int32_t count;

  int32_t rows() const { return first[count]; }
};

// Calls launch_part(table, rows before it) for as many tables as the pieces need.
template <typename P, typename Launch>
void for_each_table(const std::vector<P>& pieces, Launch launch_part) {
  using Table = PieceTable<P>;
  static_assert(sizeof(Table) + 64 <= 4096, "the table must fit a kernel's arguments");
  int64_t before = 0;
  for (size_t begin = 0; begin < pieces.size(); begin += Table::kSize) {
    Table table = {};
    const size_t rest = pieces.size() - begin;
    table.count = static_cast<int32_t>(rest < Table::kSize ? rest : Table::kSize);
    for (int i = 0; i < table.count; ++i) {
      table.pieces[i] = pieces[begin + i];
      table.first[i + 1] = table.first[i] + static_cast<int32_t>(table.pieces[i].rows());
    }
    launch_part(table, before);
    before += table.rows();
  }
}

// The row that this block works on.
template <typename P>
SELMATCH_DEVICE Part block_part(const PieceTable<P>& table) {
  const int row = static_cast<int>(blockIdx.x);
  int index = 0;
  while (table.first[index + 1] <= row) {
    ++index;
  }
  return part_of(table.pieces[index], index, row - table.first[index]);
}

#endif

}  // namespace selmatch
