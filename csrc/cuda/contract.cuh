// The contraction: partial maps <left_i, right_j>, summed over the channels and positions of a slice.
//
// Shapes: left and right (N, D, H, W, C), partial (N, parts, S, S). A program makes a tile of SIDE x SIDE of the map,
// over every `parts`-th chunk of columns (128 or 256 bytes of them), and leaves its sum: no atomics, and whoever adds
// the parts does so in a fixed order. Both operands are read with what is summed over as the fast dim, 16 bytes a
// thread where voxels are aligned, into two or three buffers of shared memory that fill while the products of another
// run. Traffic: 2 C V for S <= SIDE, and 2 C V ceil(S / SIDE) else, most of that from the cache.
#pragma once

#include "tile.cuh"

namespace rsa {

template <typename T>
struct ContractArguments {
  const T* left;
  const T* right;
  typename Numbers<T>::Sum* partial;
  Geometry shape;
  int64_t left_row, right_row, parts;
  int width;
};

// SIDE 32, 64 or 128.
template <typename T, int SIDE>
struct ContractTile {
  template <bool TENSOR_CORES, int UNUSED>
  struct Choice {
    using Product = TensorProduct<T, 2, SIDE == 128 ? 4 : 2, SIDE == 128 ? 4 : SIDE / 32, SIDE == 32 ? 2 : 4>;
  };
  template <int UNUSED>
  struct Choice<false, UNUSED> {
    using Product = ScalarProduct<T, SIDE == 128 ? 16 : 8, 16, SIDE == 32 ? 4 : 8, SIDE / 16>;
  };
  using Product = typename Choice<Numbers<T>::tensor_cores, 0>::Product;
  static constexpr int threads = Product::threads;
  static constexpr int bytes = SIDE == 32 ? 256 : 128;
  static constexpr int columns = bytes / static_cast<int>(sizeof(T));
  // Blocks that a processor runs at once: registers are given out so, and programs counted.
  static constexpr int per_processor = sizeof(T) > 2 ? (SIDE == 128 ? 1 : 2) : (SIDE == 128 ? 2 : 4);
  static constexpr int stages = SIDE == 128 ? 2 : 3;
  static constexpr int stride = shared_row(bytes, 16);
  static constexpr int stage = 2 * SIDE * stride;
  static constexpr int shared = stages * stage;
  static_assert(Product::rows == SIDE && Product::columns == SIDE, "the product fills the tile");
};

template <typename T, int SIDE>
RSA_DEVICE void contract(const ContractArguments<T>& arguments) {
  using Tile = ContractTile<T, SIDE>;
  const Geometry& shape = arguments.shape;
  const int64_t blocks = ceil_divide(shape.slices, SIDE);
  const Program program = program_at(block_index(), blocks * blocks, arguments.parts);
  const int64_t first_row = program.tile / blocks * SIDE, first_column = program.tile % blocks * SIDE;
  const int64_t chunks = ceil_divide(shape.columns(), Tile::columns);
  const int64_t steps = chunks_of_part(chunks, program.part, arguments.parts);
  char* const shared = shared_memory();

  const auto prefetch = [&](int64_t step) {
    if (step < steps) {
      char* const stage = shared + step % Tile::stages * Tile::stage;
      const int64_t start = (program.part + step * arguments.parts) * Tile::columns;
      const SliceRows<T> left{arguments.left, shape, arguments.left_row, program.sample, first_row, start};
      const SliceRows<T> right{arguments.right, shape, arguments.right_row, program.sample, first_column, start};
      fill<SIDE, Tile::bytes, Tile::stride, Tile::threads>(stage, left, arguments.width);
      fill<SIDE, Tile::bytes, Tile::stride, Tile::threads>(stage + SIDE * Tile::stride, right, arguments.width);
    }
    commit_copies();
  };

  typename Tile::Product product;
  product.clear();
  for (int64_t step = 0; step < Tile::stages - 1; ++step) prefetch(step);
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<Tile::stages - 2>();
    barrier();
    prefetch(step + Tile::stages - 1);
    const char* const stage = shared + step % Tile::stages * Tile::stage;
    product.template contract<Tile::bytes, Tile::stride>(stage, stage + SIDE * Tile::stride);
  }
  wait_copies<0>();

  auto* const partial =
      arguments.partial + (program.sample * arguments.parts + program.part) * shape.slices * shape.slices;
  product.each([&](int row, int column, typename Numbers<T>::Sum value) {
    const int64_t i = first_row + row, j = first_column + column;
    if (i < shape.slices && j < shape.slices) partial[i * shape.slices + j] = value;
  });
}

}  // namespace rsa
