// The passes over volumes in bfloat16 with AMX: an instruction multiplies a tile of 16 rows by 32 numbers with one of 32
// by 16, and adds it to 16 x 16 sums in float. Readers, layouts and what is rounded are those of kernels_bf16.h. An
// instruction wants its left factor by rows and its right one in pairs of rows, so that
//
//   project   Half tile x weights in pairs         as they are
//   mix       matrix of slices x Pair tile         as they are
//   correlate Pair tile x Pair tile                the left one turned: [position][channel] to [channel][position]
//   contract  Half tile x Half tile                the right one turned: [slice][channel] to [channel][slice]
//
// A block is 2 x 2 such tiles of sums: two registers of either factor for four products. Channels are padded to 32. What
// rows beyond the last one hold does not matter, as it reaches sums only that are not kept; what a sum runs over does.
#pragma once

#include "kernels_bf16.h"

namespace {
namespace amx {

using bf16::Half;
using bf16::N;
using bf16::Out;
using bf16::Pair;
using bf16::Shape;
using bf16::Target;
using bf16::Tiles;
using bf16::Weights;

// Rows of a tile register, and pairs in one of them; columns of a block.
constexpr int64_t ROWS = 16, PAIRS = 16, COLUMNS = 32;

inline Tiles tiles_of(int64_t channels) {
  Tiles panels(channels);
  panels.padded = (channels + 2 * PAIRS - 1) / (2 * PAIRS) * (2 * PAIRS);
  return panels;
}

// Tile registers: 0 to 3 are sums, 4 and 5 rows of the left factor, 6 and 7 columns of the right one -----------------------

struct Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// For so many rows of sums and so many pairs that a product runs over.
inline void configure(int64_t rows, int64_t pairs) {
  Configuration all;
  for (int tile = 0; tile < 8; ++tile) {
    const bool left = tile == 4 || tile == 5, right = tile > 5;
    all.rows[tile] = static_cast<uint8_t>(right ? pairs : rows);
    all.row_bytes[tile] = static_cast<uint16_t>(left ? pairs * 4 : 64);
  }
  asm volatile("ldtilecfg %0" : : "m"(all));
}

inline void release() { asm volatile("tilerelease"); }

template <int TILE>
RSA_INLINE void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(TILE) : "memory");
}

template <int TILE>
RSA_INLINE void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(TILE) : "memory");
}

template <int TILE>
RSA_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(TILE));
}

template <int SUMS, int LEFT, int RIGHT>
RSA_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

// Blocks of sums --------------------------------------------------------------------------------------------------------

// What a block sums over, in steps of one product. All strides in bytes: from a row to the next one in a register, to the
// second register of the block, to the next step.
struct Run {
  const void* left;
  int64_t left_row, left_second, left_step;
  const void* right;
  int64_t right_row, right_second, right_step;
  int64_t steps;
};

// BELOW and BESIDE: the block has a second row, or column, of tiles.
template <bool BELOW, bool BESIDE>
RSA_INLINE void add_run(const Run& run) {
  const char *left = static_cast<const char*>(run.left), *right = static_cast<const char*>(run.right);
  for (int64_t k = 0; k < run.steps; ++k, left += run.left_step, right += run.right_step) {
    load_tile<6>(right, run.right_row);
    load_tile<4>(left, run.left_row);
    multiply_tiles<0, 4, 6>();
    if (BESIDE) {
      load_tile<7>(right + run.right_second, run.right_row);
      multiply_tiles<1, 4, 7>();
    }
    if (BELOW) {
      load_tile<5>(left + run.left_second, run.left_row);
      multiply_tiles<2, 5, 6>();
      if (BESIDE) multiply_tiles<3, 5, 7>();
    }
  }
}

// Calls runs(add), which calls add(run) for all that the block sums over; leaves the sums as rows of COLUMNS.
template <bool BELOW, bool BESIDE, class Runs>
RSA_INLINE void sum_block(int64_t rows, float* sums, const Runs& runs) {
  zero_tile<0>();
  if (BESIDE) zero_tile<1>();
  if (BELOW) zero_tile<2>();
  if (BELOW && BESIDE) zero_tile<3>();
  runs([](const Run& run) { add_run<BELOW, BESIDE>(run); });
  constexpr int64_t ROW = COLUMNS * sizeof(float);
  store_tile<0>(sums, ROW);
  if (BESIDE) store_tile<1>(sums + N, ROW);
  if (BELOW) store_tile<2>(sums + rows * COLUMNS, ROW);
  if (BELOW && BESIDE) store_tile<3>(sums + rows * COLUMNS + N, ROW);
}

// The same, by whether there are more than `rows` rows, of the register, and more than 16 columns.
template <class Runs>
RSA_INLINE void sum_block(int64_t rows, bool below, bool beside, float* sums, const Runs& runs) {
  if (below) {
    if (beside) {
      sum_block<true, true>(rows, sums, runs);
    } else {
      sum_block<true, false>(rows, sums, runs);
    }
  } else if (beside) {
    sum_block<false, true>(rows, sums, runs);
  } else {
    sum_block<false, false>(rows, sums, runs);
  }
}

// Adds to the sums what is to be added, and stores them.
template <Out OUT, int VECTORS>
RSA_INLINE void finish(int64_t rows, const float* sums, const Target& to) {
  const auto row_of = [&](int64_t row, __m512 (&vectors)[VECTORS]) {
    RSA_UNROLL for (int v = 0; v < VECTORS; ++v) vectors[v] = _mm512_loadu_ps(sums + row * COLUMNS + v * N);
    bf16::add_terms(vectors, to, row);
    bf16::store_row<OUT>(vectors, to, row);
  };
  constexpr bool pairs = OUT == Out::kPair || OUT == Out::kBoth;
  __m512 first[VECTORS], second[VECTORS];
  int64_t row = 0;
  for (; row + 2 <= rows; row += 2) {
    row_of(row, first);
    row_of(row + 1, second);
    if (pairs) bf16::store_pair(first, &second, to, row);
  }
  if (row < rows) {
    row_of(row, first);
    if (pairs) bf16::store_pair<VECTORS>(first, nullptr, to, row);
  }
}

// A product, block by block: runs(row, column, add) says what a block sums over. `step` rows fill a register; columns are
// whole vectors.
template <Out OUT, class Runs>
void multiply(int64_t rows, int64_t step, int64_t columns, const Target& to, const Runs& runs) {
  alignas(64) float sums[2 * ROWS * COLUMNS];
  for (int64_t column = 0; column < columns; column += COLUMNS) {
    const bool beside = column + N < columns;
    for (int64_t row = 0; row < rows; row += 2 * step) {
      sum_block(step, row + step < rows, beside, sums, [&](const auto& add) { runs(row, column, add); });
      const int64_t count = smaller(2 * step, rows - row);
      if (beside) {
        finish<OUT, 2>(count, sums, to.at(row, column));
      } else {
        finish<OUT, 1>(count, sums, to.at(row, column));
      }
    }
  }
}

// Products of tiles -----------------------------------------------------------------------------------------------------

// out[voxel][:] = initial + bias + sum over parts and channels of rows[voxel][c] weights[c][:].
struct Projection {
  const Half* rows;
  const Pair* weights;
};

template <Out OUT, int PARTS>
void project_tile(const Shape& shape, const Projection (&parts)[PARTS], const Target& to) {
  const Tiles& panels = shape.panels;
  const int64_t voxels = shape.voxels();
  configure(ROWS, PAIRS);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t width = panels.width(panel);
    Target target = to.at(0, shape.half(panel));
    target.row = width;
    target.bias = to.bias ? to.bias + panels.start(panel) : nullptr;
    multiply<OUT>(voxels, ROWS, width, target, [&](int64_t row, int64_t column, const auto& add) {
      for (const Projection& part : parts) {
        for (int64_t from = 0; from < panels.count; ++from) {
          const int64_t wide = panels.width(from);
          const Pair* weights = part.weights + panels.start(panel) * panels.padded / 2 + panels.start(from) / 2 * width;
          add(Run{part.rows + shape.half(from) + row * wide, 2 * wide, 2 * wide * ROWS, 4 * PAIRS,  //
                  weights + column, 4 * width, 4 * N, 4 * width * PAIRS, wide / (2 * PAIRS)});
        }
      }
    });
  }
}

// out_i = initial + sum_j matrix_ij tile_j, the matrix in pairs of columns.
template <Out OUT>
void mix_tile(const Shape& shape, const Pair* matrix, const Pair* tile, const Target& to) {
  const int64_t slices = shape.slices, row_pairs = bf16::pair_rows(slices), pairs = bf16::pair_step(slices);
  // An even number of rows, so that a block begins with a pair.
  const int64_t step = 2 * balanced(bf16::pairs_of(slices), ROWS / 2);
  configure(step, pairs);
  for (int64_t panel = 0; panel < shape.panels.count; ++panel) {
    const int64_t run = shape.places * shape.panels.width(panel);
    Target target = to.at(0, shape.half(panel));
    if (to.pair) target.pair = to.pair + shape.pair(panel);
    target.row = run;
    multiply<OUT>(slices, step, run, target, [&](int64_t row, int64_t column, const auto& add) {
      add(Run{matrix + row * row_pairs, 4 * row_pairs, 4 * row_pairs * step, 4 * pairs,  //
              tile + shape.pair(panel) + column, 4 * run, 4 * N, 4 * run * pairs, row_pairs / pairs});
    });
  }
}

// Turns squares of pairs: `rows` are 16 rows, `row` pairs from one to the next.
RSA_INLINE void turn_pairs(const Pair* rows, int64_t row, Pair* to) {
  bf16::V square[N];
  bf16::V::turn(reinterpret_cast<const float*>(rows), row, square);
  RSA_UNROLL for (int i = 0; i < N; ++i) square[i].store(reinterpret_cast<float*>(to) + i * N);
}

constexpr int64_t SQUARE = N * N;

// Rows of pairs of voxels that are left over beyond whole steps, with zeros up to a step.
inline void copy_rest(const Pair* from, int64_t rows, int64_t width, Pair* to) {
  std::memcpy(to, from, rows * width * sizeof(Pair));
  std::memset(to + rows * width, 0, (PAIRS - rows) * width * sizeof(Pair));
}

// total[a][:] += sum_voxel left[voxel][a] right[voxel][:]. `turned` has room for a panel and a step, `rest` for a step of
// all panels and one of one panel.
inline void correlate_tiles(const Shape& shape, const Pair* left, const Pair* right, Pair* turned, Pair* rest,
                            float* total) {
  const Tiles& panels = shape.panels;
  const Tiles floats(panels.channels);  // the panels of `total`
  const int64_t voxels = bf16::pairs_of(shape.slices) * shape.places, steps = voxels / PAIRS, over = voxels % PAIRS;
  Pair* const left_rest = rest + PAIRS * panels.padded;
  if (over) {
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t width = panels.width(panel);
      const Pair* rows = right + shape.pair(panel) + steps * PAIRS * width;
      copy_rest(rows, over, width, rest + PAIRS * panels.start(panel));
    }
  }
  configure(ROWS, PAIRS);
  for (int64_t from = 0; from < panels.count; ++from) {
    const int64_t wide = panels.width(from), squares = wide / N;
    const Pair* rows = left + shape.pair(from);
    if (over) copy_rest(rows + steps * PAIRS * wide, over, wide, left_rest);
    for (int64_t step = 0; step < steps + (over > 0); ++step) {
      const Pair* some = step < steps ? rows + step * PAIRS * wide : left_rest;
      for (int64_t c = 0; c < squares; ++c) turn_pairs(some + c * N, wide, turned + (step * squares + c) * SQUARE);
    }
    for (int64_t to = 0; to < panels.count; ++to) {
      const int64_t width = panels.width(to), stored = floats.width(to);
      Target target;
      target.sums = total + floats.start(to) * panels.channels + panels.start(from) * stored;
      target.initial = target.sums;
      target.row = stored;
      multiply<Out::kFloat>(panels.filled(from), ROWS, stored, target, [&](int64_t row, int64_t column, const auto& add) {
        Run run{turned + row / N * SQUARE, 4 * N, 4 * SQUARE, 4 * SQUARE * squares,  //
                right + shape.pair(to) + column, 4 * width, 4 * N, 4 * width * PAIRS, steps};
        add(run);
        if (!over) return;
        run.left = turned + (steps * squares + row / N) * SQUARE;
        run.right = rest + PAIRS * panels.start(to) + column;
        run.steps = 1;
        add(run);
      });
    }
  }
}

// Squares of slices in a row of `turned`.
inline int64_t squares_of(int64_t slices) { return (slices + N - 1) / N; }

// Turns a tile for `contract_tiles`: [panel][position][channels / 32][slices / 16] squares of [channel / 2][slice].
inline void turn_slices(const Shape& shape, const Half* tile, Pair* turned) {
  const int64_t squares = squares_of(shape.slices);
  for (int64_t panel = 0; panel < shape.panels.count; ++panel) {
    const int64_t run = shape.places * shape.panels.width(panel);
    const Pair* slices = reinterpret_cast<const Pair*>(tile + shape.half(panel));
    for (int64_t k = 0; k < run / 2; k += PAIRS) {
      for (int64_t s = 0; s < squares; ++s, turned += SQUARE) turn_pairs(slices + s * N * run / 2 + k, run / 2, turned);
    }
  }
}

// products[i][j] += sum over parts of <rows_i, columns_j> over all channels and positions of a tile; `columns` turned.
template <int PARTS>
void contract_tiles(const Shape& shape, const Half* const (&parts)[PARTS], const Pair* columns, double* products) {
  // Steps of a chain that is rounded to float.
  constexpr int64_t CHAIN = 64;
  alignas(64) float sums[2 * ROWS * COLUMNS];
  const int64_t slices = shape.slices, step = balanced(slices, ROWS), squares = squares_of(slices);
  configure(step, PAIRS);
  for (int64_t row = 0; row < slices; row += 2 * step) {
    const int64_t rows = smaller(2 * step, slices - row);
    for (int64_t column = 0; column < slices; column += COLUMNS) {
      const int64_t count = smaller(COLUMNS, slices - column);
      const Pair* right = columns + column / N * SQUARE;
      for (int64_t panel = 0; panel < shape.panels.count; ++panel) {
        const int64_t run = shape.places * shape.panels.width(panel), steps = run / (2 * PAIRS);
        for (int64_t begin = 0; begin < steps; begin += CHAIN) {
          const int64_t chain = smaller(CHAIN, steps - begin);
          sum_block(step, rows > step, count > N, sums, [&](const auto& add) {
            for (const Half* part : parts) {
              add(Run{part + shape.half(panel) + row * run + begin * 2 * PAIRS, 2 * run, 2 * run * step, 4 * PAIRS,  //
                      right + begin * squares * SQUARE, 4 * N, 4 * SQUARE, 4 * squares * SQUARE, chain});
            }
          });
          for (int64_t i = 0; i < rows; ++i) {
            double* to = products + (row + i) * slices + column;
            for (int64_t j = 0; j < count; ++j) to[j] += sums[i * COLUMNS + j];
          }
        }
        right += steps * squares * SQUARE;
      }
    }
  }
}

// The passes ------------------------------------------------------------------------------------------------------------

// Scratch, in pairs: tiles, of which a forward pass needs three; what is turned; copies, matrices, a bias, what is left
// over by `correlate_tiles`.
struct Scratch {
  static constexpr int FORWARD = 3, BACKWARD = 5;
  static constexpr int64_t TILE = 512 << 10;
  Pair *tiles[BACKWARD], *turned, *copies[2], *matrices[2], *rest;
  float* bias;

  static int64_t line(int64_t elements) { return (elements + N - 1) / N * N; }
  static int64_t positions(int64_t tile) { return bf16::Scratch::positions(tile); }
  static int64_t tile_elements(const Tiles& panels, int64_t slices, int64_t tile) {
    return bf16::pair_rows(slices) * panels.padded * positions(tile);
  }
  static int64_t matrix_elements(int64_t slices) { return line((slices + 2 * ROWS) * bf16::pair_rows(slices)); }

  template <class Take>
  static void lay_out(const Tiles& panels, int64_t slices, int64_t tile, bool backward, Scratch& room, const Take& take) {
    const int64_t size = tile_elements(panels, slices, tile), places = positions(tile);
    for (int i = 0; i < (backward ? BACKWARD : FORWARD); ++i) room.tiles[i] = take(size);
    const int64_t rows = bf16::pairs_of(slices) * places + PAIRS;
    const int64_t correlated = rows * smaller(panels.padded, Tiles::WIDTH);
    const int64_t contracted = places * panels.padded / 2 * squares_of(slices) * N;
    room.turned = take(backward && correlated > contracted ? correlated : contracted);
    for (int i = 0; i < (backward ? 2 : 1); ++i) {
      room.copies[i] = take(bf16::PairReader::buffer_elements(slices, panels, places));
      room.matrices[i] = take(matrix_elements(slices));
    }
    room.bias = reinterpret_cast<float*>(take(panels.padded));
    room.rest = take(backward ? PAIRS * (panels.padded + Tiles::WIDTH) : 0);
    // Past the last buffer lines may be read, though not used.
    take(N * (slices + 2) * Tiles::WIDTH);
  }

  static int64_t elements(int64_t slices, int64_t channels, int64_t tile, bool backward) {
    Scratch nothing;
    int64_t total = 0;
    lay_out(tiles_of(channels), slices, tile, backward, nothing, [&](int64_t elements) {
      total += elements;
      return static_cast<Pair*>(nullptr);
    });
    return total;
  }

  Scratch() = default;
  Scratch(const Tiles& panels, const Range& range, bool backward, void* scratch) {
    Pair* next = static_cast<Pair*>(scratch);
    lay_out(panels, range.slices, range.tile, backward, *this, [&](int64_t elements) {
      Pair* const taken = next;
      next += elements;
      return taken;
    });
  }
  Half* half(int tile) const { return reinterpret_cast<Half*>(tiles[tile]); }
  // A row of C numbers, padded.
  const float* padded(const Tiles& panels, const void* values) const {
    const int64_t channels = panels.channels;
    std::memcpy(bias, values, channels * sizeof(float));
    std::memset(bias + channels, 0, (panels.padded - channels) * sizeof(float));
    return bias;
  }
};

inline int64_t tile_positions(int64_t slices, int64_t channels) {
  const int64_t fitting = Scratch::TILE / (slices * tiles_of(channels).padded * static_cast<int64_t>(sizeof(float)));
  return fitting < 1 ? 1 : fitting < LINE ? fitting : (fitting + LINE) / (2 * LINE) * (2 * LINE);
}

inline int64_t scratch_elements(int64_t slices, int64_t channels, int64_t tile, bool backward) {
  return Scratch::elements(slices, channels, tile, backward);
}

inline int64_t prepared_elements(int64_t channels, bool split) {
  return (split ? 2 : 1) * Weights::elements(tiles_of(channels));
}

inline void prepare(int64_t channels, int64_t begin, int64_t end, const void* panels, bool split, void* to) {
  bf16::prepare_weights(tiles_of(channels), begin, end, panels, split, static_cast<Pair*>(to));
}

// Visits the tiles of a range, and gives the registers back.
template <class Visit>
RSA_INLINE void each_tile(const Tiles& panels, const Range& range, const Visit& visit) {
  bf16::Float::each_tile(range, [&](int64_t begin, int64_t positions) {
    visit(Shape{panels, range.slices, pitch(range.slices, positions)}, begin, positions);
  });
  release();
}

inline void map(const Range& range, View x, const void* m, const void* u, double* logits, void* scratch) {
  const Tiles panels = tiles_of(range.channels);
  const Scratch room(panels, range, false, scratch);
  const Weights weights(panels, m, true);
  Half *tile = room.half(0), *high = room.half(1), *low = room.half(2);
  Target query;
  query.half = high;
  query.low = low;
  query.bias = room.padded(panels, u);
  bf16::PairReader x_reader(panels, range, x, room.copies[0]);
  each_tile(panels, range, [&](const Shape& shape, int64_t begin, int64_t positions) {
    x_reader.read(begin, positions, tile, nullptr);
    turn_slices(shape, tile, room.turned);
    project_tile<Out::kSplit>(shape, {{tile, weights.high}, {tile, weights.low}}, query);
    contract_tiles(shape, {high, low}, room.turned, logits);
  });
}

inline void mix(const Range& range, View x, const void* attention, const void* value, const void* bias, View out,
                void* scratch) {
  const Tiles panels = tiles_of(range.channels);
  const Scratch room(panels, range, false, scratch);
  const Weights weights(panels, value, false);
  bf16::pair_columns(range.slices, static_cast<const float*>(attention), false, room.matrices[0]);
  Half *tile = room.half(0), *mixed_half = room.half(1);
  Pair* pairs = room.tiles[2];
  Target mixed, total;
  mixed.half = mixed_half;
  total.initial_half = total.half = tile;
  total.bias = room.padded(panels, bias);
  bf16::PairReader x_reader(panels, range, x, room.copies[0]);
  each_tile(panels, range, [&](const Shape& shape, int64_t begin, int64_t positions) {
    x_reader.read(begin, positions, tile, pairs);
    amx::mix_tile<Out::kHalf>(shape, room.matrices[0], pairs, mixed);
    project_tile<Out::kHalf>(shape, {{mixed_half, weights.high}}, total);
    bf16::unpack_halves(panels, range, out, begin, positions, tile);
  });
}

inline void map_backward(const Range& range, View x, View grad, const void* attention, const void* value_transposed,
                         double* products, double* grad_sum, void* value_grad, View out, void* scratch) {
  const Tiles panels = tiles_of(range.channels);
  const Scratch room(panels, range, true, scratch);
  const Weights weights(panels, value_transposed, false);
  for (int i = 0; i < 2; ++i) {
    bf16::pair_columns(range.slices, static_cast<const float*>(attention), i == 1, room.matrices[i]);
  }
  // Two tiles serve twice: x by halves until it is turned, x in pairs until it is mixed.
  Half *x_half = room.half(0), *grad_half = room.half(1), *value_half = room.half(2);
  Pair *mixed_pair = room.tiles[0], *x_pair = room.tiles[3], *value_pair = room.tiles[3], *grad_pair = room.tiles[4];
  Target value, mixed, total;
  value.half = value_half;
  mixed.pair = mixed_pair;
  total.initial_half = total.half = grad_half;
  bf16::PairReader x_reader(panels, range, x, room.copies[0]);
  bf16::PairReader grad_reader(panels, range, grad, room.copies[1]);
  each_tile(panels, range, [&](const Shape& shape, int64_t begin, int64_t positions) {
    x_reader.read(begin, positions, x_half, value_grad ? x_pair : nullptr);
    grad_reader.read(begin, positions, grad_half, value_grad ? grad_pair : nullptr);
    bf16::add_voxels(shape, grad_half, nullptr, grad_sum);
    turn_slices(shape, x_half, room.turned);
    project_tile<Out::kHalf>(shape, {{grad_half, weights.high}}, value);
    contract_tiles(shape, {value_half}, room.turned, products);
    if (value_grad) {
      amx::mix_tile<Out::kPair>(shape, room.matrices[0], x_pair, mixed);
      correlate_tiles(shape, grad_pair, mixed_pair, room.turned, room.rest, static_cast<float*>(value_grad));
    }
    if (out.data) {
      bf16::pair_slices(shape, value_half, value_pair);
      amx::mix_tile<Out::kHalf>(shape, room.matrices[1], value_pair, total);
      bf16::unpack_halves(panels, range, out, begin, positions, grad_half);
    }
  });
}

inline void mix_backward(const Range& range, View x, View partial, const void* grad_logits, const void* column,
                         const void* m, const void* m_transposed, const void* u, void* m_grad, double* u_grad,
                         View out, void* scratch) {
  const Tiles panels = tiles_of(range.channels);
  const Scratch room(panels, range, true, scratch);
  const Weights weights(panels, m, false), transposed(panels, m_transposed, false);
  const float* coefficients = static_cast<const float*>(column);
  for (int i = 0; i < 2; ++i) {
    bf16::pair_columns(range.slices, static_cast<const float*>(grad_logits), i == 1, room.matrices[i]);
  }
  // x by halves serves until its voxels are added.
  Half *x_half = room.half(0), *mixed_half = room.half(1), *other_half = room.half(0), *partial_half = room.half(2);
  Pair *x_pair = room.tiles[3], *mixed_pair = room.tiles[4];
  float* factors = reinterpret_cast<float*>(room.turned);  // of each voxel
  Target mixed, other, total;
  mixed.half = mixed_half;
  mixed.pair = mixed_pair;
  other.half = other_half;
  total.initial_half = total.half = partial_half;
  total.bias = room.padded(panels, u);
  total.factors = factors;
  bf16::PairReader x_reader(panels, range, x, room.copies[0]);
  bf16::PairReader partial_reader(panels, range, partial, room.copies[1]);
  each_tile(panels, range, [&](const Shape& shape, int64_t begin, int64_t positions) {
    x_reader.read(begin, positions, m_grad ? x_half : nullptr, x_pair);
    if (m_grad) {
      amx::mix_tile<Out::kBoth>(shape, room.matrices[0], x_pair, mixed);
      correlate_tiles(shape, x_pair, mixed_pair, room.turned, room.rest, static_cast<float*>(m_grad));
      bf16::add_voxels(shape, x_half, coefficients, u_grad);
    } else {
      amx::mix_tile<Out::kHalf>(shape, room.matrices[0], x_pair, mixed);
    }
    if (out.data) {
      partial_reader.read(begin, positions, partial_half, nullptr);
      amx::mix_tile<Out::kHalf>(shape, room.matrices[1], x_pair, other);
      for (int64_t s = 0; s < range.slices; ++s) {
        for (int64_t p = 0; p < shape.places; ++p) factors[s * shape.places + p] = coefficients[s];
      }
      project_tile<Out::kHalf>(shape, {{mixed_half, transposed.high}, {other_half, weights.high}}, total);
      bf16::unpack_halves(panels, range, out, begin, positions, partial_half);
    }
  });
}

inline void contract(const Range& range, View left, View right, double* products, void* scratch) {
  const Tiles panels = tiles_of(range.channels);
  const Scratch room(panels, range, true, scratch);
  bf16::PairReader left_reader(panels, range, left, room.copies[0]);
  bf16::PairReader right_reader(panels, range, right, room.copies[1]);
  each_tile(panels, range, [&](const Shape& shape, int64_t begin, int64_t positions) {
    left_reader.read(begin, positions, room.half(0), nullptr);
    right_reader.read(begin, positions, room.half(1), nullptr);
    turn_slices(shape, room.half(1), room.turned);
    contract_tiles(shape, {room.half(0)}, room.turned, products);
  });
}

inline void mix_slices(const Range& range, View x, const void* matrix, bool transposed, View out, void* scratch) {
  const Tiles panels = tiles_of(range.channels);
  const Scratch room(panels, range, false, scratch);
  bf16::pair_columns(range.slices, static_cast<const float*>(matrix), transposed, room.matrices[0]);
  bf16::PairReader x_reader(panels, range, x, room.copies[0]);
  Target mixed;
  mixed.half = room.half(1);
  each_tile(panels, range, [&](const Shape& shape, int64_t begin, int64_t positions) {
    x_reader.read(begin, positions, nullptr, room.tiles[0]);
    amx::mix_tile<Out::kHalf>(shape, room.matrices[0], room.tiles[0], mixed);
    bf16::unpack_halves(panels, range, out, begin, positions, mixed.half);
  });
}

}  // namespace amx
}  // namespace
