// The passes over volumes in bfloat16 with the processor's own products of pairs: each lane adds two products of
// bfloat16 to a sum in float, so that a pass takes half the instructions of kernels.h. Where that file keeps a tile in
// float, this one keeps one or both of
//
//   Half  T[panel][slice][position][channel]         pairs are neighbouring channels: `project` and `dot` read them
//   Pair  T[panel][slice / 2][position][channel][2]  pairs are neighbouring slices: `mix` and `correlate` read them
//
// with panels of as many channels as there, and zeros for the second slice where the number of slices is odd.
//
// Volumes are exact in bfloat16. Softmax magnifies an error of the logits, so all that they are made of is there twice,
// rounded and what the rounding left over: M, and Q' = M^T x + u. Together these hold 16 bits, and the map costs as
// much as in float. Attention maps, projected and mixed volumes, and all gradients between the kernels of a pass are
// rounded once; sums are in float, and in double where they are there. Products and operands below 2^-126 count as
// zero: so the instruction is made.
#pragma once

#include "kernels.h"

namespace {
namespace bf16 {

using V = Avx512Float;
using Tiles = Panels<V>;
using Float = Kernels<V, BFloat16>;
using Half = uint16_t;
using Pair = uint32_t;

constexpr int N = V::N, ROWS = 6, VECTORS = 4;

// Pairs that a number of rows, slices or channels makes.
inline int64_t pairs_of(int64_t count) { return (count + 1) / 2; }
// Rows of pairs that slices take in a tile or a matrix: those beyond the slices are zero, so that AMX can take all of
// them in steps of the same length.
constexpr int64_t PAIR_STEP = 16;
inline int64_t pair_step(int64_t slices) { return balanced(pairs_of(slices), PAIR_STEP); }
inline int64_t pair_rows(int64_t slices) {
  const int64_t step = pair_step(slices);
  return (pairs_of(slices) + step - 1) / step * step;
}

// Vectors of halves ---------------------------------------------------------------------------------------------------

// The types of the intrinsics are opaque, and not the same in all compilers.
template <class To, class From>
RSA_INLINE To as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

RSA_INLINE __m512 add_products(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, as<__m512bh>(a), as<__m512bh>(b));
}
RSA_INLINE __m256i narrowed(__m512 a) { return as<__m256i>(_mm512_cvtneps_pbh(a)); }
// a, then b.
RSA_INLINE __m512i narrowed(__m512 a, __m512 b) { return as<__m512i>(_mm512_cvtne2ps_pbh(b, a)); }
RSA_INLINE __m512 widened(__m256i halves) { return V::from(halves, BFloat16()).value; }

RSA_INLINE __m256i load_half(const Half* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
RSA_INLINE void store_half(Half* to, __m256i halves) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves); }
RSA_INLINE __m512i load(const void* from) { return _mm512_loadu_si512(from); }
RSA_INLINE void store(void* to, __m512i bits) { _mm512_storeu_si512(to, bits); }

// Lane l holds first[l] and second[l].
RSA_INLINE __m512i paired(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}
// The same of 32 lanes: the lower half of them, and the upper one.
RSA_INLINE __m512i paired_low(__m512i first, __m512i second) {
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(first, order, second);
}
RSA_INLINE __m512i paired_high(__m512i first, __m512i second) {
  const __m512i order = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54, 22,
                                         53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  return _mm512_permutex2var_epi16(first, order, second);
}
RSA_INLINE __m256i first_of(__m512i pairs) { return _mm512_cvtepi32_epi16(pairs); }
RSA_INLINE __m256i second_of(__m512i pairs) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)); }
// The same of two vectors of pairs.
RSA_INLINE __m512i first_of(__m512i a, __m512i b) {
  const __m512i order = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24,
                                         22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_permutex2var_epi16(a, order, b);
}
RSA_INLINE __m512i second_of(__m512i a, __m512i b) {
  const __m512i order = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(a, order, b);
}
// As `paired`, of two vectors of sums.
RSA_INLINE __m512i paired(__m512 first, __m512 second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, narrowed(first, second));
}

// The first kernel: C[r][v] = initial + sum_k <B[r, k], X[k][v]>, k counting pairs ------------------------------------

// What becomes of the sums: kept in float; rounded to halves; to halves and what is left over; rows paired; or rows
// both paired and as halves.
enum class Out { kFloat, kHalf, kSplit, kPair, kBoth };

// Where the sums go, and what is added to them last: floats and halves in the places of the sums, and a row for all,
// times a factor of each row if `factors` is not null.
struct Target {
  float* sums = nullptr;
  Half *half = nullptr, *low = nullptr;
  Pair* pair = nullptr;
  const float *bias = nullptr, *factors = nullptr;
  const float* initial = nullptr;
  const Half* initial_half = nullptr;
  // From a row to the next one, in all of them; from a pair of rows to the next one in `pair`.
  int64_t row = 0;

  Target at(int64_t rows, int64_t columns) const {
    const int64_t offset = rows * row + columns;
    Target moved = *this;
    if (sums) moved.sums += offset;
    if (half) moved.half += offset;
    if (low) moved.low += offset;
    if (pair) moved.pair += rows / 2 * row + columns;
    if (bias) moved.bias += columns;
    if (factors) moved.factors += rows;
    if (initial) moved.initial += offset;
    if (initial_half) moved.initial_half += offset;
    return moved;
  }
};

// What is added to the sums of a row last.
template <int NV>
RSA_INLINE void add_terms(__m512 (&sums)[NV], const Target& to, int64_t row) {
  if (to.initial) {
    RSA_UNROLL for (int v = 0; v < NV; ++v) {
      sums[v] = _mm512_add_ps(sums[v], _mm512_loadu_ps(to.initial + row * to.row + v * N));
    }
  }
  if (to.initial_half) {
    RSA_UNROLL for (int v = 0; v < NV; ++v) {
      sums[v] = _mm512_add_ps(sums[v], widened(load_half(to.initial_half + row * to.row + v * N)));
    }
  }
  if (to.bias) {
    RSA_UNROLL for (int v = 0; v < NV; ++v) {
      const __m512 bias = _mm512_loadu_ps(to.bias + v * N);
      sums[v] = to.factors ? _mm512_fmadd_ps(_mm512_set1_ps(to.factors[row]), bias, sums[v])
                           : _mm512_add_ps(sums[v], bias);
    }
  }
}

// A row where it goes by itself.
template <Out OUT, int NV>
RSA_INLINE void store_row(const __m512 (&sums)[NV], const Target& to, int64_t row) {
  const int64_t at = row * to.row;
  if (OUT == Out::kFloat) {
    RSA_UNROLL for (int v = 0; v < NV; ++v) _mm512_storeu_ps(to.sums + at + v * N, sums[v]);
  }
  if (OUT == Out::kHalf || OUT == Out::kBoth) {
    RSA_UNROLL for (int v = 0; v + 1 < NV; v += 2) store(to.half + at + v * N, narrowed(sums[v], sums[v + 1]));
    if (NV % 2) store_half(to.half + at + (NV - 1) * N, narrowed(sums[NV - 1]));
  }
  if (OUT == Out::kSplit) {
    RSA_UNROLL for (int v = 0; v < NV; ++v) {
      const __m256i high = narrowed(sums[v]);
      store_half(to.half + at + v * N, high);
      store_half(to.low + at + v * N, narrowed(_mm512_sub_ps(sums[v], widened(high))));
    }
  }
}

// An even row and the next one, or null where it is the last.
template <int NV>
RSA_INLINE void store_pair(const __m512 (&first)[NV], const __m512 (*second)[NV], const Target& to, int64_t row) {
  RSA_UNROLL for (int v = 0; v < NV; ++v) {
    store(to.pair + row / 2 * to.row + v * N, paired(first[v], second ? (*second)[v] : _mm512_setzero_ps()));
  }
}

// B and X: pairs, by their strides; X in two parts if `low` is not null.
struct Factors {
  const Pair* b;
  int64_t b_row, b_step;
  const Pair *x, *low;
  int64_t x_step, steps;
};

template <int R, int NV, Out OUT>
void pair_updates(const Factors& factors, const Target& to) {
  __m512 sums[R][NV];
  RSA_UNROLL for (int r = 0; r < R; ++r) {
    RSA_UNROLL for (int v = 0; v < NV; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  const int64_t b_row = factors.b_row, b_step = factors.b_step, x_step = factors.x_step;
  for (const Pair* x = factors.x; x;) {
    const Pair* const part = x;
    const Pair* b = factors.b;
    const Pair* upper = b + 3 * b_row;
    for (int64_t k = 0; k < factors.steps; ++k) {
      __m512i columns[NV];
      RSA_UNROLL for (int v = 0; v < NV; ++v) columns[v] = load(x + v * N);
      RSA_UNROLL for (int r = 0; r < R; ++r) {
        const __m512i factor = _mm512_set1_epi32(static_cast<int>(r < 3 ? b[r * b_row] : upper[(r - 3) * b_row]));
        RSA_UNROLL for (int v = 0; v < NV; ++v) sums[r][v] = add_products(sums[r][v], factor, columns[v]);
      }
      b += b_step;
      upper += b_step;
      x += x_step;
    }
    x = part == factors.low ? nullptr : factors.low;
  }
  RSA_UNROLL for (int r = 0; r < R; ++r) {
    add_terms(sums[r], to, r);
    store_row<OUT>(sums[r], to, r);
  }
  if (OUT == Out::kPair || OUT == Out::kBoth) {
    RSA_UNROLL for (int r = 0; r < R; r += 2) store_pair(sums[r], r + 1 < R ? &sums[r + 1] : nullptr, to, r);
  }
}

template <int NV, Out OUT>
void multiply_pairs(int64_t rows, int64_t column, const Factors& factors, const Target& to) {
  static constexpr void (*table[ROWS])(const Factors&, const Target&) = {
      pair_updates<1, NV, OUT>, pair_updates<2, NV, OUT>, pair_updates<3, NV, OUT>,
      pair_updates<4, NV, OUT>, pair_updates<5, NV, OUT>, pair_updates<6, NV, OUT>};
  // Blocks of rows start at even ones where rows are paired.
  const bool by_two = OUT == Out::kPair || OUT == Out::kBoth;
  const int64_t block = by_two ? 2 * balanced(pairs_of(rows), ROWS / 2) : balanced(rows, ROWS);
  Factors some = factors;
  some.x += column;
  if (some.low) some.low += column;
  for (int64_t row = 0; row < rows; row += block) {
    some.b = factors.b + row * factors.b_row;
    table[smaller(block, rows - row) - 1](some, to.at(row, column));
  }
}

template <Out OUT>
void multiply_pairs(int64_t rows, int64_t columns, const Factors& factors, const Target& to) {
  int64_t column = 0;
  for (; column + VECTORS * N <= columns; column += VECTORS * N) {
    multiply_pairs<VECTORS, OUT>(rows, column, factors, to);
  }
  switch ((columns - column) / N) {
    case 1: multiply_pairs<1, OUT>(rows, column, factors, to); break;
    case 2: multiply_pairs<2, OUT>(rows, column, factors, to); break;
    case 3: multiply_pairs<3, OUT>(rows, column, factors, to); break;
    default: break;
  }
}

// Products of tiles ---------------------------------------------------------------------------------------------------

// Sizes of a tile. `places` are its positions and what the pitch adds.
struct Shape {
  const Tiles& panels;
  int64_t slices, places;
  int64_t voxels() const { return slices * places; }
  int64_t half(int64_t panel) const { return panels.start(panel) * voxels(); }
  int64_t pair(int64_t panel) const { return panels.start(panel) * pair_rows(slices) * places; }
};

// Weights (C, C) in pairs of rows, in panels of columns, rows and columns beyond C zero; in two parts, or with `low` null
// in one.
struct Weights {
  const Pair *high, *low;

  Weights(const Tiles& panels, const void* prepared, bool split)
      : high(static_cast<const Pair*>(prepared)), low(split ? high + elements(panels) : nullptr) {}
  static int64_t elements(const Tiles& panels) { return panels.padded / 2 * panels.padded; }
};

// Rounds rows [begin, end) of panels of floats, `begin` being even: once if not `split`, which leaves `low` alone.
inline void prepare_weights(const Tiles& panels, int64_t begin, int64_t end, const void* from, bool split, Pair* high) {
  const Tiles floats(panels.channels);
  Pair* low = high + Weights::elements(panels);
  const int64_t last = end == panels.channels ? panels.padded : end;
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t width = panels.width(panel), wide = floats.width(panel);
    const float* rows = static_cast<const float*>(from) + panels.start(panel) * panels.channels;
    for (int64_t row = begin; row < last; row += 2) {
      for (int64_t c = 0; c < width; c += N) {
        const auto read = [&](int64_t r) {
          return r < end && c < wide ? _mm512_loadu_ps(rows + r * wide + c) : _mm512_setzero_ps();
        };
        const __m512 a = read(row), b = read(row + 1);
        const int64_t at = panels.start(panel) * panels.padded / 2 + row / 2 * width + c;
        store(high + at, paired(a, b));
        if (!split) continue;
        store(low + at, paired(_mm512_sub_ps(a, widened(narrowed(a))), _mm512_sub_ps(b, widened(narrowed(b)))));
      }
    }
  }
}

// out[voxel][:] = initial + bias + sum_c rows[voxel][c] weights[c][:]; `sums` has room for a panel in float, or is a
// tile where the result goes or the initial one is.
template <Out OUT>
void project_tile(const Shape& shape, const Half* rows, const Weights& weights, const Target& to, float* sums) {
  const Tiles& panels = shape.panels;
  const int64_t voxels = shape.voxels();
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t width = panels.width(panel), offset = shape.half(panel);
    Target target = to.at(0, offset);
    target.row = width;
    target.sums = OUT == Out::kFloat || to.initial ? sums + offset : sums;
    target.bias = to.bias ? to.bias + panels.start(panel) : nullptr;
    for (int64_t from = 0; from < panels.count; ++from) {
      const int64_t wide = panels.width(from), steps = pairs_of(panels.filled(from));
      const int64_t block = panels.start(panel) * panels.padded / 2 + panels.start(from) / 2 * width;
      const Pair* source = reinterpret_cast<const Pair*>(rows + shape.half(from));
      const Factors factors{source, wide / 2, 1, weights.high + block, weights.low ? weights.low + block : nullptr,
                            width, steps};
      if (from + 1 < panels.count) {
        multiply_pairs<Out::kFloat>(voxels, width, factors, target);
      } else {
        multiply_pairs<OUT>(voxels, width, factors, target);
      }
      target.bias = nullptr;
      target.initial_half = nullptr;
      target.initial = target.sums;
    }
  }
}

// out_i = initial + sum_j matrix_ij tile_j, the matrix in pairs of columns.
template <Out OUT>
void mix_tile(const Shape& shape, const Pair* matrix, const Pair* tile, const Target& to) {
  const int64_t pairs = pairs_of(shape.slices), row = pair_rows(shape.slices);
  for (int64_t panel = 0; panel < shape.panels.count; ++panel) {
    const int64_t run = shape.places * shape.panels.width(panel);
    Target target = to.at(0, shape.half(panel));
    if (to.pair) target.pair = to.pair + shape.pair(panel);
    target.row = run;
    multiply_pairs<OUT>(shape.slices, run, {matrix, row, 1, tile + shape.pair(panel), nullptr, run, pairs}, target);
  }
}

// total[a][:] += sum_voxel left[voxel][a] right[voxel][:].
void correlate_tiles(const Shape& shape, const Pair* left, const Pair* right, float* total) {
  // So many pairs of voxels of two panels stay in the first cache while they are used.
  constexpr int64_t STEPS = 64;
  const Tiles& panels = shape.panels;
  const int64_t voxels = pairs_of(shape.slices) * shape.places;
  for (int64_t from = 0; from < panels.count; ++from) {
    const int64_t wide = panels.width(from);
    for (int64_t to = 0; to < panels.count; ++to) {
      const int64_t width = panels.width(to);
      Target target;
      target.sums = total + panels.start(to) * panels.channels + panels.start(from) * width;
      target.initial = target.sums;
      target.row = width;
      for (int64_t voxel = 0; voxel < voxels; voxel += STEPS) {
        const Pair* rows = left + shape.pair(from) + voxel * wide;
        const Pair* columns = right + shape.pair(to) + voxel * width;
        multiply_pairs<Out::kFloat>(panels.filled(from), width,
                                    {rows, 1, wide, columns, nullptr, width, smaller(STEPS, voxels - voxel)}, target);
      }
    }
  }
}

// The second kernel: inner products of R rows and four columns --------------------------------------------------------

// A vector of halves, or the half of one that is left.
template <bool WHOLE>
RSA_INLINE __m512i load_pairs(const Half* from) {
  return WHOLE ? load(from) : _mm512_zextsi256_si512(load_half(from));
}

// sums[r][q] += rows_r column_q, and low_r column_q if SPLIT: R rows, of which the first three start at `rows`.
template <int R, bool SPLIT, bool WHOLE>
RSA_INLINE void add_dots(const Half* rows, const Half* low, int64_t run, const Half* const (&columns)[4], int64_t k,
                         __m512 (&sums)[R][4]) {
  const Half *upper = rows + 3 * run, *upper_low = low + 3 * run;
  __m512i factors[4];
  RSA_UNROLL for (int q = 0; q < 4; ++q) factors[q] = load_pairs<WHOLE>(columns[q] + k);
  RSA_UNROLL for (int r = 0; r < R; ++r) {
    const __m512i factor = load_pairs<WHOLE>((r < 3 ? rows + r * run : upper + (r - 3) * run) + k);
    RSA_UNROLL for (int q = 0; q < 4; ++q) sums[r][q] = add_products(sums[r][q], factor, factors[q]);
    if (SPLIT) {
      const __m512i rest = load_pairs<WHOLE>((r < 3 ? low + r * run : upper_low + (r - 3) * run) + k);
      RSA_UNROLL for (int q = 0; q < 4; ++q) sums[r][q] = add_products(sums[r][q], rest, factors[q]);
    }
  }
}

// to[q] += the sum of vector q, q < count.
RSA_INLINE void add_four(__m512 a, __m512 b, __m512 c, __m512 d, double* to, int count) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  // Every quarter holds partial sums of a, b, c, d.
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __mmask8 mask = static_cast<__mmask8>((1u << count) - 1);
  const __m256d total = _mm256_add_pd(_mm256_maskz_loadu_pd(mask, to), _mm256_cvtps_pd(quarter));
  _mm256_mask_storeu_pd(to, mask, total);
}

// to[r][q] += <rows_{row + r} + low_{row + r}, columns_{column + q}>, q < count; `low` only if SPLIT.
template <int R, bool SPLIT>
void dot_halves(const Shape& shape, const Half* rows, const Half* low, const Half* columns, int64_t row, int64_t column,
                int count, double* to) {
  // Vectors of a chain that is rounded to float: two terms a lane each.
  constexpr int64_t CHAIN = 64;
  constexpr int64_t LANES = 2 * N;
  for (int64_t panel = 0; panel < shape.panels.count; ++panel) {
    const int64_t run = shape.places * shape.panels.width(panel), offset = shape.half(panel);
    const int64_t vectors = run / LANES, chains = (vectors + CHAIN - 1) / CHAIN;
    const int64_t chain = chains ? (vectors + chains - 1) / chains * LANES : run;
    const Half *left = rows + offset + row * run, *left_low = SPLIT ? low + offset + row * run : left;
    const Half* right[4];
    RSA_UNROLL for (int q = 0; q < 4; ++q) right[q] = columns + offset + (column + (q < count ? q : count - 1)) * run;
    for (int64_t begin = 0; begin < run; begin += chain) {
      __m512 sums[R][4];
      RSA_UNROLL for (int r = 0; r < R; ++r) {
        RSA_UNROLL for (int q = 0; q < 4; ++q) sums[r][q] = _mm512_setzero_ps();
      }
      const int64_t end = smaller(run, begin + chain), whole = begin + (end - begin) / LANES * LANES;
      for (int64_t k = begin; k < whole; k += LANES) add_dots<R, SPLIT, true>(left, left_low, run, right, k, sums);
      // Half a vector is left where the channels of a panel are an odd number of vectors.
      if (whole < end) add_dots<R, SPLIT, false>(left, left_low, run, right, whole, sums);
      RSA_UNROLL for (int r = 0; r < R; ++r) {
        add_four(sums[r][0], sums[r][1], sums[r][2], sums[r][3], to + r * shape.slices, count);
      }
    }
  }
}

// products[i][j] += <rows_i + low_i, columns_j> over all channels and positions of a tile.
template <bool SPLIT>
void contract_tiles(const Shape& shape, const Half* rows, const Half* low, const Half* columns, double* products) {
  static constexpr decltype(&dot_halves<1, SPLIT>) table[ROWS] = {dot_halves<1, SPLIT>, dot_halves<2, SPLIT>,
                                                                  dot_halves<3, SPLIT>, dot_halves<4, SPLIT>,
                                                                  dot_halves<5, SPLIT>, dot_halves<6, SPLIT>};
  const int64_t slices = shape.slices, block = balanced(slices, ROWS);
  for (int64_t row = 0; row < slices; row += block) {
    const auto kernel = table[smaller(block, slices - row) - 1];
    for (int64_t column = 0; column < slices; column += 4) {
      kernel(shape, rows, low, columns, row, column, static_cast<int>(smaller(4, slices - column)),
             products + row * slices + column);
    }
  }
}

// Between layouts -----------------------------------------------------------------------------------------------------

// A matrix (S, S) in pairs of columns, or its transpose; columns beyond S are zero.
inline void pair_columns(int64_t slices, const float* matrix, bool transposed, Pair* to) {
  const auto half = [&](int64_t i, int64_t j) {
    BFloat16 value{0};
    if (j < slices) narrow(transposed ? matrix[j * slices + i] : matrix[i * slices + j], value);
    return static_cast<Pair>(value.bits);
  };
  for (int64_t i = 0; i < slices; ++i) {
    for (int64_t j = 0; j < 2 * pair_rows(slices); j += 2) *to++ = half(i, j) | half(i, j + 1) << 16;
  }
}

// Zeroes what a tile of pairs has beyond its slices.
inline void clear_beyond(const Shape& shape, Pair* tile) {
  const int64_t pairs = pairs_of(shape.slices), beyond = pair_rows(shape.slices) - pairs;
  for (int64_t panel = 0; beyond && panel < shape.panels.count; ++panel) {
    const int64_t run = shape.places * shape.panels.width(panel);
    std::memset(tile + shape.pair(panel) + pairs * run, 0, beyond * run * sizeof(Pair));
  }
}

// Pairs the slices of a tile.
inline void pair_slices(const Shape& shape, const Half* tile, Pair* to) {
  clear_beyond(shape, to);
  for (int64_t panel = 0; panel < shape.panels.count; ++panel) {
    const int64_t run = shape.places * shape.panels.width(panel);
    const Half* from = tile + shape.half(panel);
    Pair* pairs = to + shape.pair(panel);
    for (int64_t s = 0; s < shape.slices; s += 2, from += 2 * run, pairs += run) {
      const bool both = s + 1 < shape.slices;
      for (int64_t k = 0; k < run; k += N) {
        store(pairs + k, paired(load_half(from + k), both ? load_half(from + run + k) : _mm256_setzero_si256()));
      }
    }
  }
}

// totals (C) += sum over voxels of coefficients[slice] * tile; coefficients null: 1. In double from slice to slice.
inline void add_voxels(const Shape& shape, const Half* tile, const float* coefficients, double* totals) {
  const Tiles& panels = shape.panels;
  for (int64_t c = 0; c < panels.channels; c += N) {
    const int64_t panel = c / Tiles::WIDTH, width = panels.width(panel);
    const Half* from = tile + shape.half(panel) + (c - panels.start(panel));
    for (int64_t s = 0; s < shape.slices; ++s) {
      // Four sums that need not wait for each other.
      __m512 sums[4];
      RSA_UNROLL for (int i = 0; i < 4; ++i) sums[i] = _mm512_setzero_ps();
      int64_t p = 0;
      for (; p + 4 <= shape.places; p += 4, from += 4 * width) {
        RSA_UNROLL for (int i = 0; i < 4; ++i) sums[i] = _mm512_add_ps(sums[i], widened(load_half(from + i * width)));
      }
      for (; p < shape.places; ++p, from += width) sums[0] = _mm512_add_ps(sums[0], widened(load_half(from)));
      float lanes[N];
      _mm512_storeu_ps(lanes, _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
      const double coefficient = coefficients ? static_cast<double>(coefficients[s]) : 1;
      for (int i = 0; i < N; ++i) totals[c + i] += coefficient * lanes[i];
    }
  }
}

RSA_INLINE __m256i gather(const Half* from, int64_t stride, int count) {
  if (stride == 1) return count == N ? load_half(from) : _mm256_maskz_loadu_epi16(V::first(count), from);
  Half lanes[N] = {};
  for (int i = 0; i < count; ++i) lanes[i] = from[i * stride];
  return load_half(lanes);
}

RSA_INLINE __mmask32 first_halves(int count) { return static_cast<__mmask32>((uint64_t{1} << count) - 1); }

// Stores the first `count` halves. In powers of two: stores under a mask take several times as long as these.
RSA_INLINE void store_first(Half* to, __m512i halves, int count) {
  if (count == 2 * N) return store(to, halves);
  __m256i half = _mm512_castsi512_si256(halves);
  if (count & 16) {
    store_half(to, half);
    half = _mm512_extracti64x4_epi64(halves, 1);
    to += 16;
  }
  __m128i quarter = _mm256_castsi256_si128(half);
  if (count & 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), quarter);
    quarter = _mm256_extracti128_si256(half, 1);
    to += 8;
  }
  if (count & 4) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), quarter);
    quarter = _mm_srli_si128(quarter, 8);
    to += 4;
  }
  int32_t rest = _mm_cvtsi128_si32(quarter);
  if (count & 2) {
    std::memcpy(to, &rest, 4);
    rest = _mm_extract_epi16(quarter, 2);
    to += 2;
  }
  if (count & 1) *to = static_cast<Half>(rest);
}

RSA_INLINE void scatter(__m512i halves, Half* to, int64_t stride, int count) {
  if (stride == 1) return store_first(to, halves, count);
  Half lanes[2 * N];
  store(lanes, halves);
  for (int i = 0; i < count; ++i) to[i * stride] = lanes[i];
}

// Calls visit(position in the tile, offset in the volume) for the positions of a slice.
template <class Visit>
RSA_INLINE void each_position(const Range& range, const View& view, int64_t begin, int64_t positions,
                              const Visit& visit) {
  int64_t outer = begin / range.inner, inner = begin % range.inner;
  for (int64_t p = 0; p < positions; ++p) {
    visit(p, outer * view.outer + inner * view.inner);
    if (++inner == range.inner) inner = 0, ++outer;
  }
}

// Reads tiles of a volume, one after the other, as halves and as pairs, each if it is not null. As the reader of floats
// does, but what is copied and turned are pairs of slices.
class PairReader {
 public:
  static constexpr int64_t COPIED = 64;

  static int64_t buffer_elements(int64_t slices, const Tiles& panels, int64_t positions) {
    const int64_t copied = rounded(positions > COPIED ? positions : COPIED), pairs = pairs_of(slices);
    const int64_t rows = pairs * copied, turned = copied * rounded(pairs);
    return panels.padded * ((rows > turned ? rows : turned) + N);
  }

  PairReader(const Tiles& panels, const Range& range, const View& view, Pair* buffer)
      : panels_(panels), range_(range), view_(view), buffer_(buffer) {}

  // Positions [begin, begin + positions), which follow those of the call before.
  void read(int64_t begin, int64_t positions, Half* half, Pair* pair) {
    const int64_t step = pitch(range_.slices, positions);
    const Shape shape{panels_, range_.slices, step};
    if (pair) clear_beyond(shape, pair);
    if (step > positions) {
      for (int64_t panel = 0; panel < panels_.count; ++panel) {
        const int64_t width = panels_.width(panel), last = positions * width;
        Half* halves = half ? half + shape.half(panel) + last : nullptr;
        Pair* pairs = pair ? pair + shape.pair(panel) + last : nullptr;
        for (int64_t s = 0; s < range_.slices; ++s) {
          if (half) std::memset(halves + s * step * width, 0, width * sizeof(Half));
          if (pair && s % 2 == 0) std::memset(pairs + s / 2 * step * width, 0, width * sizeof(Pair));
        }
      }
    }
    if (view_.channel == 1 && panels_.channels > 1) return read_voxels(begin, positions, shape, half, pair);
    if (begin + positions > end_) {
      begin_ = begin;
      end_ = smaller(range_.end, begin + (positions > COPIED ? positions : COPIED));
      copy();
    }
    const int64_t pairs = pairs_of(range_.slices);
    const int64_t lines = along_slices_ ? positions : pairs, length = along_slices_ ? pairs : positions;
    const Pair* from = buffer_ + (begin - begin_) * (along_slices_ ? row_ : 1);
    for (int64_t line = 0; line < lines; ++line) {
      int64_t c = 0;
      for (; c + 2 * N <= panels_.padded; c += 2 * N) place<2>(shape, c, line, length, from + line * row_, half, pair);
      if (c < panels_.padded) place<1>(shape, c, line, length, from + line * row_, half, pair);
    }
  }

 private:
  static int64_t rounded(int64_t length) { return (length + N - 1) / N * N; }

  // Turns a line of one or two vectors of channels. As floats, of which none is computed with.
  template <int VECTORS>
  void place(const Shape& shape, int64_t c, int64_t line, int64_t length, const Pair* from, Half* half,
             Pair* pair) const {
    const int64_t panel = c / Tiles::WIDTH, width = panels_.width(panel), channel = c - panels_.start(panel);
    // From a pair of slices to the next one.
    const int64_t row = shape.places * width;
    Half* halves = half ? half + shape.half(panel) + channel + line * (along_slices_ ? width : 2 * row) : nullptr;
    Pair* pairs = pair ? pair + shape.pair(panel) + channel + line * (along_slices_ ? width : row) : nullptr;
    for (int64_t at = 0; at < length; at += N) {
      V squares[VECTORS][N];
      RSA_UNROLL for (int v = 0; v < VECTORS; ++v) {
        V::turn(reinterpret_cast<const float*>(from + (c + v * N) * channel_ + at), channel_, squares[v]);
      }
      const int64_t left = length - at;
      RSA_UNROLL for (int i = 0; i < N; ++i) {
        if (i >= left) continue;
        const __m512i first = _mm512_castps_si512(squares[0][i].value);
        const __m512i second = _mm512_castps_si512(squares[VECTORS - 1][i].value);
        const int64_t next = at + i;
        if (pair) {
          Pair* to = pairs + next * (along_slices_ ? row : width);
          store(to, first);
          if (VECTORS == 2) store(to + N, second);
        }
        if (half) {
          Half* to = halves + next * (along_slices_ ? 2 * row : width);
          const bool both = 2 * (along_slices_ ? next : line) + 1 < shape.slices;
          if (VECTORS == 2) {
            store(to, first_of(first, second));
            if (both) store(to + row, second_of(first, second));
          } else {
            store_half(to, first_of(first));
            if (both) store_half(to + row, second_of(first));
          }
        }
      }
    }
  }

  // A volume whose channels are neighbours is as a tile of halves is.
  void read_voxels(int64_t begin, int64_t positions, const Shape& shape, Half* half, Pair* pair) {
    for (int64_t s = 0; s < range_.slices; s += 2) {
      const Half* slice = static_cast<const Half*>(view_.data) + s * view_.slice;
      const bool both = s + 1 < range_.slices;
      each_position(range_, view_, begin, positions, [&](int64_t p, int64_t offset) {
        for (int64_t c = 0, next; c < panels_.padded; c = next) {
          const int64_t panel = c / Tiles::WIDTH, width = panels_.width(panel), channel = c - panels_.start(panel);
          const Half* from = slice + offset + c;
          const int64_t voxel = s * shape.places + p, two_voxels = s / 2 * shape.places + p;
          Half* halves = half ? half + shape.half(panel) + voxel * width + channel : nullptr;
          Pair* pairs = pair ? pair + shape.pair(panel) + two_voxels * width + channel : nullptr;
          if (c + 2 * N <= panels_.channels) {
            next = c + 2 * N;
            const __m512i first = load(from), second = both ? load(from + view_.slice) : _mm512_setzero_si512();
            if (pair) store(pairs, paired_low(first, second));
            if (pair) store(pairs + N, paired_high(first, second));
            if (half) store(halves, first);
            if (half && both) store(halves + shape.places * width, second);
          } else {
            next = c + N;
            const int count = c < panels_.channels ? static_cast<int>(smaller(N, panels_.channels - c)) : 0;
            const __m256i first = gather(from, 1, count);
            const __m256i second = both ? gather(from + view_.slice, 1, count) : _mm256_setzero_si256();
            if (pair) store(pairs, paired(first, second));
            if (half) store_half(halves, first);
            if (half && both) store_half(halves + shape.places * width, second);
          }
        }
      });
    }
  }

  // Copies positions [begin_, end_): [channel][slice / 2][position], or [channel][position][slice / 2].
  void copy() {
    const int64_t positions = end_ - begin_, pairs = pairs_of(range_.slices);
    const Runs runs(range_, view_, begin_);
    along_slices_ = runs.along_slices;
    row_ = rounded(along_slices_ ? pairs : positions);
    channel_ = (along_slices_ ? positions : pairs) * row_ + N;
    Range by_two = range_;
    View view = view_;
    by_two.slices = pairs;
    view.slice *= 2;
    for (int64_t c = 0; c < panels_.channels; ++c) {
      const Half* from = static_cast<const Half*>(view_.data) + c * view_.channel;
      Pair* to = buffer_ + c * channel_;
      if (along_slices_) {
        // Neighbours in memory are pairs already.
        each_run<2 * N>(range_, view_, runs, positions, [&](int64_t s, int64_t p, int64_t offset, int count) {
          const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << count) - 1);
          store(to + p * row_ + s / 2, _mm512_maskz_loadu_epi16(mask, from + offset));
        });
      } else {
        each_run<N>(by_two, view, runs, positions, [&](int64_t s, int64_t p, int64_t offset, int count) {
          const __m256i first = gather(from + offset, runs.stride, count);
          const __m256i second = 2 * s + 1 < range_.slices ? gather(from + offset + view_.slice, runs.stride, count)
                                                           : _mm256_setzero_si256();
          store(to + s * row_ + p, paired(first, second));
        });
      }
    }
    std::memset(buffer_ + panels_.channels * channel_, 0,
                (panels_.padded - panels_.channels) * channel_ * sizeof(Pair));
  }

  const Tiles& panels_;
  const Range& range_;
  const View view_;
  Pair* buffer_;
  int64_t begin_ = 0, end_ = -1, row_ = 0, channel_ = 0;
  bool along_slices_ = false;
};

// Writes up to 32 channels of up to 16 or 32 voxels. What is turned are pairs of channels: a panel may end within a
// square, and what lies behind it is not used.
template <int VECTORS>
void turn_channels(const Half* from, int64_t row, Half* to, int64_t channel, int64_t channels, int64_t stride,
                   int count) {
  V squares[VECTORS][N];
  RSA_UNROLL for (int v = 0; v < VECTORS; ++v) {
    V::turn(reinterpret_cast<const float*>(from + v * N * row), row / 2, squares[v]);
  }
  RSA_UNROLL for (int i = 0; i < N; ++i) {
    if (2 * i >= channels) continue;
    const __m512i a = _mm512_castps_si512(squares[0][i].value);
    const __m512i b = VECTORS == 2 ? _mm512_castps_si512(squares[VECTORS - 1][i].value) : a;
    scatter(first_of(a, b), to + 2 * i * channel, stride, count);
    if (2 * i + 1 < channels) scatter(second_of(a, b), to + (2 * i + 1) * channel, stride, count);
  }
}

// Writes a tile back.
inline void unpack_halves(const Tiles& panels, const Range& range, const View& view, int64_t begin, int64_t positions,
                          const Half* tile) {
  Half* volume = static_cast<Half*>(view.data);
  const Shape shape{panels, range.slices, pitch(range.slices, positions)};
  if (view.channel == 1 && panels.channels > 1) {
    for (int64_t s = 0; s < range.slices; ++s) {
      each_position(range, view, begin, positions, [&](int64_t p, int64_t offset) {
        for (int64_t c = 0; c < panels.channels; c += 2 * N) {
          const int64_t panel = c / Tiles::WIDTH, width = panels.width(panel);
          const Half* from = tile + shape.half(panel) + (s * shape.places + p) * width + (c - panels.start(panel));
          scatter(load(from), volume + s * view.slice + offset + c, 1,
                  static_cast<int>(smaller(2 * N, panels.channels - c)));
        }
      });
    }
    return;
  }
  const Runs run(range, view, begin);
  const int64_t next = run.along_slices ? shape.places : 1;
  each_run<2 * N>(range, view, run, positions, [&](int64_t s, int64_t p, int64_t offset, int count) {
    for (int64_t c = 0; c < panels.channels; c += 2 * N) {
      const int64_t panel = c / Tiles::WIDTH, width = panels.width(panel);
      const Half* from = tile + shape.half(panel) + (s * shape.places + p) * width + (c - panels.start(panel));
      const auto turn = count > N ? turn_channels<2> : turn_channels<1>;
      Half* to = volume + offset + c * view.channel;
      turn(from, next * width, to, view.channel, panels.channels - c, run.stride, count);
    }
  });
}

// The passes ----------------------------------------------------------------------------------------------------------

// Scratch, in floats: a tile of floats, tiles of halves or pairs, copies, matrices of slices. Tiles of pairs have an even
// number of slices.
struct Scratch {
  static constexpr int TILES = 7;
  float* sums;
  void* tiles[TILES];
  Pair* copies[2];
  Pair* matrices[2];

  static int64_t line(int64_t elements) { return (elements + N - 1) / N * N; }
  static int64_t positions(int64_t tile) { return Float::longest(tile) | 1; }
  static int64_t tile(int64_t slices, int64_t channels, int64_t tile) {
    return pair_rows(slices) * Tiles(channels).padded * positions(tile);
  }

  // Past the last buffer lines may be read, though not used.
  static int64_t elements(int64_t slices, int64_t channels, int64_t most) {
    const Tiles panels(channels);
    return (2 + TILES) * tile(slices, channels, most) +
           2 * PairReader::buffer_elements(slices, panels, positions(most)) + 2 * line(slices * pair_rows(slices)) +
           N * (slices + 2) * Tiles::WIDTH;
  }

  Scratch(const Range& range, void* scratch) {
    const Tiles panels(range.channels);
    const int64_t size = tile(range.slices, range.channels, range.tile);
    sums = static_cast<float*>(scratch);
    Pair* next = static_cast<Pair*>(scratch) + 2 * size;
    const auto take = [&](int64_t elements) {
      Pair* const taken = next;
      next += elements;
      return taken;
    };
    for (void*& each : tiles) each = take(size);
    for (Pair*& each : matrices) each = take(line(range.slices * pair_rows(range.slices)));
    for (Pair*& each : copies) {
      each = take(PairReader::buffer_elements(range.slices, panels, positions(range.tile)));
    }
  }
  Half* half(int tile) const { return static_cast<Half*>(tiles[tile]); }
  Pair* pair(int tile) const { return static_cast<Pair*>(tiles[tile]); }
};

// As many positions as a tile of floats has, but whole lines of memory, which hold twice as many.
inline int64_t tile_positions(int64_t slices, int64_t channels) {
  const int64_t fitting = Float::tile_positions(slices, channels);
  return fitting < LINE ? fitting : (fitting + LINE) / (2 * LINE) * (2 * LINE);
}

inline int64_t scratch_elements(int64_t slices, int64_t channels, int64_t tile, bool) {
  return Scratch::elements(slices, channels, tile);
}

inline int64_t prepared_elements(int64_t channels, bool split) {
  return (split ? 2 : 1) * Weights::elements(Tiles(channels));
}

inline void prepare(int64_t channels, int64_t begin, int64_t end, const void* panels, bool split, void* to) {
  prepare_weights(Tiles(channels), begin, end, panels, split, static_cast<Pair*>(to));
}

inline void map(const Range& range, View x, const void* m, const void* u, double* logits, void* scratch) {
  const Tiles panels(range.channels);
  const Scratch room(range, scratch);
  Half *tile = room.half(0), *high = room.half(1), *low = room.half(2);
  const Weights weights(panels, m, true);
  PairReader x_reader(panels, range, x, room.copies[0]);
  Float::each_tile(range, [&](int64_t begin, int64_t positions) {
    const Shape shape{panels, range.slices, pitch(range.slices, positions)};
    x_reader.read(begin, positions, tile, nullptr);
    Target query;
    query.half = high;
    query.low = low;
    query.bias = static_cast<const float*>(u);
    project_tile<Out::kSplit>(shape, tile, weights, query, room.sums);
    contract_tiles<true>(shape, high, low, tile, logits);
  });
}

inline void mix(const Range& range, View x, const void* attention, const void* value, const void* bias, View out,
                void* scratch) {
  const Tiles panels(range.channels);
  const Scratch room(range, scratch);
  const Weights weights(panels, value, false);
  pair_columns(range.slices, static_cast<const float*>(attention), false, room.matrices[0]);
  PairReader x_reader(panels, range, x, room.copies[0]);
  Float::each_tile(range, [&](int64_t begin, int64_t positions) {
    const Shape shape{panels, range.slices, pitch(range.slices, positions)};
    x_reader.read(begin, positions, room.half(0), room.pair(1));
    Target mixed, total;
    mixed.half = room.half(2);
    mix_tile<Out::kHalf>(shape, room.matrices[0], room.pair(1), mixed);
    total.initial_half = total.half = room.half(0);
    total.bias = static_cast<const float*>(bias);
    project_tile<Out::kHalf>(shape, mixed.half, weights, total, room.sums);
    unpack_halves(panels, range, out, begin, positions, total.half);
  });
}

inline void map_backward(const Range& range, View x, View grad, const void* attention, const void* value_transposed,
                         double* products, double* grad_sum, void* value_grad, View out, void* scratch) {
  const Tiles panels(range.channels);
  const Scratch room(range, scratch);
  const Weights weights(panels, value_transposed, false);
  for (int i = 0; i < 2; ++i) {
    pair_columns(range.slices, static_cast<const float*>(attention), i == 1, room.matrices[i]);
  }
  Half *x_half = room.half(0), *grad_half = room.half(1), *value_half = room.half(2);
  Pair *x_pair = room.pair(3), *grad_pair = room.pair(4), *value_pair = room.pair(5), *mixed_pair = room.pair(6);
  PairReader x_reader(panels, range, x, room.copies[0]);
  PairReader grad_reader(panels, range, grad, room.copies[1]);
  Float::each_tile(range, [&](int64_t begin, int64_t positions) {
    const Shape shape{panels, range.slices, pitch(range.slices, positions)};
    x_reader.read(begin, positions, x_half, value_grad ? x_pair : nullptr);
    grad_reader.read(begin, positions, grad_half, value_grad ? grad_pair : nullptr);
    add_voxels(shape, grad_half, nullptr, grad_sum);
    Target value;
    value.half = value_half;
    project_tile<Out::kHalf>(shape, grad_half, weights, value, room.sums);
    contract_tiles<false>(shape, value_half, nullptr, x_half, products);
    if (value_grad) {
      Target mixed;
      mixed.pair = mixed_pair;
      mix_tile<Out::kPair>(shape, room.matrices[0], x_pair, mixed);
      correlate_tiles(shape, grad_pair, mixed_pair, static_cast<float*>(value_grad));
    }
    if (out.data) {
      pair_slices(shape, value_half, value_pair);
      Target total;
      total.initial_half = total.half = grad_half;
      mix_tile<Out::kHalf>(shape, room.matrices[1], value_pair, total);
      unpack_halves(panels, range, out, begin, positions, grad_half);
    }
  });
}

inline void mix_backward(const Range& range, View x, View partial, const void* grad_logits, const void* column,
                         const void* m, const void* m_transposed, const void* u, void* m_grad, double* u_grad,
                         View out, void* scratch) {
  const Tiles panels(range.channels);
  const Scratch room(range, scratch);
  const Weights weights(panels, m, false), transposed(panels, m_transposed, false);
  const float* coefficients = static_cast<const float*>(column);
  for (int i = 0; i < 2; ++i) {
    pair_columns(range.slices, static_cast<const float*>(grad_logits), i == 1, room.matrices[i]);
  }
  Half *x_half = room.half(0), *mixed_half = room.half(1), *partial_half = room.half(2);
  Pair *x_pair = room.pair(3), *mixed_pair = room.pair(4);
  float* factors = static_cast<float*>(room.tiles[5]);  // of each voxel
  PairReader x_reader(panels, range, x, room.copies[0]);
  PairReader partial_reader(panels, range, partial, room.copies[1]);
  Float::each_tile(range, [&](int64_t begin, int64_t positions) {
    const Shape shape{panels, range.slices, pitch(range.slices, positions)};
    x_reader.read(begin, positions, m_grad ? x_half : nullptr, x_pair);
    Target mixed, total;
    mixed.half = mixed_half;
    mixed.pair = mixed_pair;
    if (m_grad) {
      mix_tile<Out::kBoth>(shape, room.matrices[0], x_pair, mixed);
      correlate_tiles(shape, x_pair, mixed_pair, static_cast<float*>(m_grad));
      add_voxels(shape, x_half, coefficients, u_grad);
    } else {
      mix_tile<Out::kHalf>(shape, room.matrices[0], x_pair, mixed);
    }
    if (out.data) {
      partial_reader.read(begin, positions, partial_half, nullptr);
      total.initial_half = partial_half;
      project_tile<Out::kFloat>(shape, mixed_half, transposed, total, room.sums);
      mix_tile<Out::kHalf>(shape, room.matrices[1], x_pair, mixed);
      total = Target();
      total.initial = room.sums;
      total.half = partial_half;
      total.bias = static_cast<const float*>(u);
      total.factors = factors;
      for (int64_t s = 0; s < range.slices; ++s) {
        for (int64_t p = 0; p < shape.places; ++p) factors[s * shape.places + p] = coefficients[s];
      }
      project_tile<Out::kHalf>(shape, mixed_half, weights, total, room.sums);
      unpack_halves(panels, range, out, begin, positions, partial_half);
    }
  });
}

inline void contract(const Range& range, View left, View right, double* products, void* scratch) {
  const Tiles panels(range.channels);
  const Scratch room(range, scratch);
  PairReader left_reader(panels, range, left, room.copies[0]);
  PairReader right_reader(panels, range, right, room.copies[1]);
  Float::each_tile(range, [&](int64_t begin, int64_t positions) {
    const Shape shape{panels, range.slices, pitch(range.slices, positions)};
    left_reader.read(begin, positions, room.half(0), nullptr);
    right_reader.read(begin, positions, room.half(1), nullptr);
    contract_tiles<false>(shape, room.half(0), nullptr, room.half(1), products);
  });
}

inline void mix_slices(const Range& range, View x, const void* matrix, bool transposed, View out, void* scratch) {
  const Tiles panels(range.channels);
  const Scratch room(range, scratch);
  pair_columns(range.slices, static_cast<const float*>(matrix), transposed, room.matrices[0]);
  PairReader x_reader(panels, range, x, room.copies[0]);
  Float::each_tile(range, [&](int64_t begin, int64_t positions) {
    const Shape shape{panels, range.slices, pitch(range.slices, positions)};
    x_reader.read(begin, positions, nullptr, room.pair(0));
    Target mixed;
    mixed.half = room.half(1);
    mix_tile<Out::kHalf>(shape, room.matrices[0], room.pair(0), mixed);
    unpack_halves(panels, range, out, begin, positions, mixed.half);
  });
}

}  // namespace bf16
}  // namespace
