// The mix: out_i = base_i + beta * sum_j matrix_ij volume_j + row_scale_i vector; base and the last term may be
// absent.
//
// Shapes: matrix (N, SP, SP), padded with zeros; volume, base, out (N, D, H, W, C); row_scale (N, SP); vector (C,). A
// program makes SIDE slices of every `parts`-th chunk of columns; it sums over j in blocks of 128 bytes of a matrix's
// row. Those blocks stay in shared memory where all of them fit (S <= 192 in 16 bits, 96 in float32, 48 in float64),
// and are read again, from the cache, where they do not; the volume streams through three buffers. The sum goes to
// memory in whole vectors: lanes exchange it first. Traffic: C V to read the volume for S <= SIDE (ceil(S / SIDE)
// times that else, most of it from the cache), C V for base, C V to write.
#pragma once

#include "tile.cuh"

namespace rsa {

template <typename T>
struct MixArguments {
  using Sum = typename Numbers<T>::Sum;
  const T* matrix;
  const T* volume;
  const T* base;          // null: zero
  const Sum* beta;        // null: one
  const Sum* row_scale;   // null: no rank-one term
  const Sum* vector;
  T* out;                 // may be base
  Geometry shape;
  int64_t volume_row, base_row, out_row, parts;
  int width;
  bool aligned;  // whether vectors of base and out are
};

// SIDE 32, 64 or 128.
template <typename T, int SIDE>
struct MixTile {
  template <bool TENSOR_CORES, int UNUSED>
  struct Choice {
    using Product = TensorProduct<T, SIDE / 32, SIDE == 32 ? 4 : 2, 2, 4>;
  };
  template <int UNUSED>
  struct Choice<false, UNUSED> {
    using Product = ScalarProduct<T, SIDE / 8, SIDE == 32 ? 32 : 16, 8, Vector<T>::size>;
  };
  using Product = typename Choice<Numbers<T>::tensor_cores, 0>::Product;
  static constexpr int threads = Product::threads;
  static constexpr int number = static_cast<int>(sizeof(T));
  static constexpr int columns = Product::columns;
  static constexpr int depth = 128 / number;  // slices that a step sums over
  static constexpr int stages = 3;
  // Blocks that a processor runs at once: registers are given out so, and programs counted.
  static constexpr int per_processor = sizeof(T) > 2 ? (SIDE == 128 ? 1 : 2) : (SIDE == 128 ? 2 : 4);
  static constexpr int map_stride = shared_row(128, 16);
  static constexpr int volume_stride = shared_row(columns * number, Product::right_padding);
  static constexpr int map_bytes = SIDE * map_stride;
  static constexpr int volume_bytes = depth * volume_stride;
  static constexpr int shared = stages * (map_bytes + volume_bytes);
  static_assert(Product::rows == SIDE, "the product fills the tile");
};

template <typename T, int SIDE>
RSA_DEVICE void mix(const MixArguments<T>& arguments) {
  using Tile = MixTile<T, SIDE>;
  using Product = typename Tile::Product;
  using Sum = typename Numbers<T>::Sum;
  const Geometry& shape = arguments.shape;
  const int64_t padded = padded_slices(shape.slices);
  const int64_t blocks = ceil_divide(shape.slices, SIDE);
  const Program program = program_at(block_index(), blocks, arguments.parts);
  const int64_t first_row = program.tile * SIDE;
  const int64_t chunks = ceil_divide(shape.columns(), Tile::columns);
  const int64_t depths = ceil_divide(shape.slices, Tile::depth);
  const int64_t steps = chunks_of_part(chunks, program.part, arguments.parts) * depths;
  const bool resident = depths <= Tile::stages;
  char* const map_tiles = shared_memory();
  char* const volume_tiles = map_tiles + Tile::stages * Tile::map_bytes;
  const auto map_tile = [&](int64_t step) {
    return map_tiles + (resident ? step % depths : step % Tile::stages) * Tile::map_bytes;
  };
  const auto volume_tile = [&](int64_t step) { return volume_tiles + step % Tile::stages * Tile::volume_bytes; };
  const auto start_of = [&](int64_t step) {
    return (program.part + step / depths * arguments.parts) * Tile::columns;
  };

  const auto prefetch = [&](int64_t step) {
    if (step < steps) {
      const int64_t slice = step % depths * Tile::depth;
      if (!resident || step < depths) {
        const MapRows<T> map{arguments.matrix, padded, program.sample, first_row, slice};
        fill_by<16, SIDE, 128, Tile::map_stride, Tile::threads>(map_tile(step), map);
      }
      const SliceRows<T> volume{arguments.volume, shape, arguments.volume_row, program.sample, slice, start_of(step)};
      fill<Tile::depth, Tile::columns * Tile::number, Tile::volume_stride, Tile::threads>(
          volume_tile(step), volume, arguments.width);
    }
    commit_copies();
  };

  const auto store = [&](const Product& product, int64_t start) {
    constexpr int vector = Vector<T>::size;
    Sum values[Product::held][Product::run];
    product.runs(values);
    const Sum beta = arguments.beta ? *arguments.beta : Sum(1);
    const auto mixed = [&](Sum base, Sum value, int64_t slice, int64_t channel) {
      Sum result = base + beta * value;
      if (arguments.row_scale) {
        result += arguments.row_scale[program.sample * padded + slice] * arguments.vector[channel];
      }
      return rounded<T>(result);
    };
    if (arguments.aligned) {
      RSA_UNROLL
      for (int unit = 0; unit < Product::run; unit += vector) {
        const Column column = column_at(shape, start + Product::run_column() + unit);
        RSA_UNROLL
        for (int index = 0; index < Product::held; ++index) {
          const int64_t slice = first_row + Product::run_row(index);
          if (slice < shape.slices && column.exists) {
            Vector<T> result;
            if (arguments.base) {
              const T* base = arguments.base + element(shape, arguments.base_row, program.sample, slice, column);
              load_16_bytes(&result, base);
            }
            RSA_UNROLL
            for (int e = 0; e < vector; ++e) {
              const Sum base = arguments.base ? widen(result.at[e]) : Sum(0);
              result.at[e] = mixed(base, values[index][unit + e], slice, column.channel + e);
            }
            T* out = arguments.out + element(shape, arguments.out_row, program.sample, slice, column);
            store_16_bytes(out, &result);
          }
        }
      }
      return;
    }
    RSA_UNROLL
    for (int e = 0; e < Product::run; ++e) {
      const Column column = column_at(shape, start + Product::run_column() + e);
      RSA_UNROLL
      for (int index = 0; index < Product::held; ++index) {
        const int64_t slice = first_row + Product::run_row(index);
        if (slice < shape.slices && column.exists) {
          Sum base = 0;
          if (arguments.base) {
            base = widen(arguments.base[element(shape, arguments.base_row, program.sample, slice, column)]);
          }
          arguments.out[element(shape, arguments.out_row, program.sample, slice, column)] =
              mixed(base, values[index][e], slice, column.channel);
        }
      }
    }
  };

  Product product;
  product.clear();
  for (int64_t step = 0; step < Tile::stages - 1; ++step) prefetch(step);
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<Tile::stages - 2>();
    barrier();
    prefetch(step + Tile::stages - 1);
    const int64_t left = padded - step % depths * Tile::depth;
    product.template multiply<Tile::depth, Tile::map_stride, Tile::volume_stride>(
        map_tile(step), volume_tile(step), static_cast<int>(left < Tile::depth ? left : Tile::depth));
    if (step % depths == depths - 1) {
      store(product, start_of(step));
      product.clear();
    }
  }
  wait_copies<0>();
}

}  // namespace rsa
