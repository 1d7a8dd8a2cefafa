// The transposition between contiguous and channels-last volumes: target[n, c, r] = source[n, r, c].
//
// Shapes: source (N, R, C), target (N, C, R); here R are the channels and C the voxels, or the other way round. A
// program moves one tile of 64 x 64 through shared memory, whose rows are padded by 4 bytes (or one number), so that
// neither side meets a bank twice; both sides touch memory in runs of 64 numbers. Traffic: one read, one write: 2 C V.
#pragma once

#include "index.cuh"

namespace rsa {

struct TransposeArguments {
  const void* source;
  void* target;
  int64_t rows, columns;
};

// Number: an unsigned integer of the numbers' size.
template <typename Number>
struct TransposeTile {
  static constexpr int side = 64, threads = 256;
  static constexpr int stride = side + (sizeof(Number) < 4 ? 4 / static_cast<int>(sizeof(Number)) : 1);
  static constexpr int shared = side * stride * static_cast<int>(sizeof(Number));
};

template <typename Number>
RSA_DEVICE void transpose(const TransposeArguments& arguments) {
  using Tile = TransposeTile<Number>;
  const int64_t across = ceil_divide(arguments.columns, Tile::side);
  const int64_t tiles = across * ceil_divide(arguments.rows, Tile::side);
  const int64_t sample = block_index() / tiles, tile = block_index() % tiles;
  const int64_t first_row = tile / across * Tile::side, first_column = tile % across * Tile::side;
  const int64_t offset = sample * arguments.rows * arguments.columns;
  const Number* const source = static_cast<const Number*>(arguments.source) + offset;
  Number* const target = static_cast<Number*>(arguments.target) + offset;
  Number* const shared = reinterpret_cast<Number*>(shared_memory());
  const int fast = thread_index() % 32, slow = thread_index() / 32;
  RSA_UNROLL
  for (int row = 0; row < Tile::side; row += Tile::threads / 32) {
    RSA_UNROLL
    for (int column = 0; column < Tile::side; column += 32) {
      const int64_t r = first_row + row + slow, c = first_column + column + fast;
      if (r < arguments.rows && c < arguments.columns) {
        shared[(row + slow) * Tile::stride + column + fast] = source[r * arguments.columns + c];
      }
    }
  }
  barrier();
  RSA_UNROLL
  for (int column = 0; column < Tile::side; column += Tile::threads / 32) {
    RSA_UNROLL
    for (int row = 0; row < Tile::side; row += 32) {
      const int64_t r = first_row + row + fast, c = first_column + column + slow;
      if (r < arguments.rows && c < arguments.columns) {
        target[c * arguments.rows + r] = shared[(row + fast) * Tile::stride + column + slow];
      }
    }
  }
}

}  // namespace rsa
