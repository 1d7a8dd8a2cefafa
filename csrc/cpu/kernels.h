// The passes, for one vector type: included once for each instruction set.
//
// A tile holds all S slices and all C channels at some positions, packed as T[panel][slice][position][channel]: panels of
// 256 bytes of channels (the last one narrower), so that lanes are channels, all products read memory in order, and a
// block of 64 x 64 weights stays in the first cache. Lanes beyond C are zero and stay so. Then
//
//   project   T'[voxel][:] = sum_c T[voxel][c] W[c][:]           rows are voxels
//   mix       T'[i][:]     = sum_j A[i][j] T[j][:]               rows are slices, columns all positions and channels
//   correlate W'[c][:]    += sum_voxel T[voxel][c] T'[voxel][:]  rows are channels
//
// are one kernel (`rank_one_updates`) with other strides, and `dot`, <T_i, T'_j>, is the second.
// Traffic: map C*V, mix 2 C*V, map_backward 3 C*V, mix_backward 3 C*V.
#pragma once

#include <cstdint>
#include <cstring>

#include "norm_kernels.h"
#include "passes.h"
#include "storage.h"

namespace {

using rsa::LINE;
using rsa::Range;
using rsa::View;

template <class V>
using Of = typename V::T;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Panels ------------------------------------------------------------------------------------------------------------

template <class V>
struct Panels {
  static constexpr int64_t WIDTH = 256 / sizeof(Of<V>);
  int64_t channels, padded, count;

  explicit Panels(int64_t channels)
      : channels(channels), padded((channels + V::N - 1) / V::N * V::N), count((channels + WIDTH - 1) / WIDTH) {}
  int64_t start(int64_t panel) const { return panel * WIDTH; }
  // Lanes of a panel, and the channels in it.
  int64_t width(int64_t panel) const { return smaller(WIDTH, padded - start(panel)); }
  int64_t filled(int64_t panel) const { return smaller(WIDTH, channels - start(panel)); }
};

// The first kernel: C[r][v] = init + sum_k B[r, k] X[k][v] ------------------------------------------------------------

template <class V>
using Update = void (*)(const Of<V>* b, int64_t b_row, int64_t b_step, const Of<V>* x, int64_t x_step, Of<V>* c,
                        int64_t c_row, int64_t steps, const Of<V>* initial, int64_t initial_row);

// `initial` is added to the sums: a row for all (initial_row 0), c itself, or null for nothing. It is added last, so that
// the terms of a sum in many calls are not added one after the other, each with the rounding of the whole.
template <class V, int R, int NV>
void rank_one_updates(const Of<V>* b, int64_t b_row, int64_t b_step, const Of<V>* x, int64_t x_step, Of<V>* c,
                      int64_t c_row, int64_t steps, const Of<V>* initial, int64_t initial_row) {
  V sums[R][NV];
  RSA_UNROLL for (int r = 0; r < R; ++r) {
    RSA_UNROLL for (int v = 0; v < NV; ++v) sums[r][v] = V::zero();
  }
  // Two base pointers of three rows each: what addressing modes reach.
  const Of<V>* upper = b + 3 * b_row;
  for (int64_t k = 0; k < steps; ++k) {
    V columns[NV];
    RSA_UNROLL for (int v = 0; v < NV; ++v) columns[v] = V::load(x + v * V::N);
    RSA_UNROLL for (int r = 0; r < R; ++r) {
      const V factor = V::set(r < 3 ? b[r * b_row] : upper[(r - 3) * b_row]);
      RSA_UNROLL for (int v = 0; v < NV; ++v) sums[r][v] = V::multiply_add(factor, columns[v], sums[r][v]);
    }
    b += b_step;
    upper += b_step;
    x += x_step;
  }
  if (initial) {
    RSA_UNROLL for (int r = 0; r < R; ++r) {
      RSA_UNROLL for (int v = 0; v < NV; ++v) {
        sums[r][v] = V::add(sums[r][v], V::load(initial + r * initial_row + v * V::N));
      }
    }
  }
  RSA_UNROLL for (int r = 0; r < R; ++r) {
    RSA_UNROLL for (int v = 0; v < NV; ++v) sums[r][v].store(c + r * c_row + v * V::N);
  }
}

template <class V, int NV>
struct Updates {
  static Update<V> of(int64_t rows) {
    static constexpr Update<V> table[6] = {rank_one_updates<V, 1, NV>, rank_one_updates<V, 2, NV>,
                                           rank_one_updates<V, 3, NV>, rank_one_updates<V, 4, NV>,
                                           rank_one_updates<V, 5, NV>, rank_one_updates<V, 6, NV>};
    return table[rows - 1];
  }
};

// Rows of a block when `rows` are cut into equal blocks of at most ROWS.
inline int64_t balanced(int64_t rows, int64_t limit) {
  const int64_t blocks = (rows + limit - 1) / limit;
  return (rows + blocks - 1) / blocks;
}

// All rows and columns of a product; columns in vectors. With accumulate on top of what C holds.
template <class V, int NV>
void multiply_columns(int64_t rows, const Of<V>* b, int64_t b_row, int64_t b_step, const Of<V>* x, int64_t x_step,
                      Of<V>* c, int64_t c_row, int64_t steps, bool accumulate, const Of<V>* bias) {
  const int64_t block = balanced(rows, V::ROWS);
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t count = smaller(block, rows - row);
    Of<V>* to = c + row * c_row;
    Updates<V, NV>::of(count)(b + row * b_row, b_row, b_step, x, x_step, to, c_row, steps, accumulate ? to : bias,
                              accumulate ? c_row : 0);
  }
}

template <class V>
void multiply(int64_t rows, int64_t columns, const Of<V>* b, int64_t b_row, int64_t b_step, const Of<V>* x,
              int64_t x_step, Of<V>* c, int64_t c_row, int64_t steps, bool accumulate, const Of<V>* bias) {
  int64_t column = 0;
  for (; column + V::VECTORS * V::N <= columns; column += V::VECTORS * V::N) {
    multiply_columns<V, V::VECTORS>(rows, b, b_row, b_step, x + column, x_step, c + column, c_row, steps, accumulate,
                                    bias ? bias + column : nullptr);
  }
  const Of<V>* start = bias ? bias + column : nullptr;
  x += column;
  c += column;
  switch ((columns - column) / V::N) {
    case 1: multiply_columns<V, 1>(rows, b, b_row, b_step, x, x_step, c, c_row, steps, accumulate, start); break;
    case 2: multiply_columns<V, 2>(rows, b, b_row, b_step, x, x_step, c, c_row, steps, accumulate, start); break;
    case 3: multiply_columns<V, 3>(rows, b, b_row, b_step, x, x_step, c, c_row, steps, accumulate, start); break;
    default: break;
  }
}

// Products of tiles ----------------------------------------------------------------------------------------------------

// out[voxel][:] = initial + sum_c rows[voxel][c] weights[c][:], for voxels [begin, end) of `voxels`.
template <class V>
void project_tile(const Panels<V>& panels, int64_t voxels, int64_t begin, int64_t end, const Of<V>* rows,
                  const Of<V>* weights, Of<V>* out, bool accumulate, const Of<V>* bias) {
  for (int64_t to = 0; to < panels.count; ++to) {
    const int64_t width = panels.width(to);
    Of<V>* target = out + panels.start(to) * voxels + begin * width;
    for (int64_t from = 0; from < panels.count; ++from) {
      const int64_t wide = panels.width(from);
      const Of<V>* source = rows + panels.start(from) * voxels + begin * wide;
      const Of<V>* block = weights + panels.start(to) * panels.channels + panels.start(from) * width;
      multiply<V>(end - begin, width, source, wide, 1, block, width, target, width, panels.filled(from),
                  accumulate || from > 0, bias ? bias + panels.start(to) : nullptr);
    }
  }
}

// out_i = sum_j matrix_ij tile_j; the matrix by its strides, so that its transpose needs no copy.
template <class V>
void mix_tile(const Panels<V>& panels, int64_t slices, int64_t positions, const Of<V>* matrix, int64_t row,
              int64_t column, const Of<V>* tile, Of<V>* out, bool accumulate) {
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t offset = panels.start(panel) * slices * positions, run = positions * panels.width(panel);
    multiply<V>(slices, run, matrix, row, column, tile + offset, run, out + offset, run, slices, accumulate, nullptr);
  }
}

// total[a][:] += sum_voxel left[voxel][a] right[voxel][:], for channels [begin, end) of left.
template <class V>
void correlate_tiles(const Panels<V>& panels, int64_t voxels, int64_t begin, int64_t end, const Of<V>* left,
                     const Of<V>* right, Of<V>* total) {
  // So many voxels of two panels stay in the first cache while they are used.
  constexpr int64_t STEPS = 64;
  for (int64_t from = begin / Panels<V>::WIDTH; from < panels.count && panels.start(from) < end; ++from) {
    const int64_t first = begin > panels.start(from) ? begin - panels.start(from) : 0;
    const int64_t last = smaller(panels.filled(from), end - panels.start(from)), wide = panels.width(from);
    for (int64_t to = 0; to < panels.count; ++to) {
      const int64_t width = panels.width(to);
      Of<V>* target = total + panels.start(to) * panels.channels + (panels.start(from) + first) * width;
      for (int64_t voxel = 0; voxel < voxels; voxel += STEPS) {
        const Of<V>* rows = left + panels.start(from) * voxels + voxel * wide + first;
        const Of<V>* columns = right + panels.start(to) * voxels + voxel * width;
        multiply<V>(last - first, width, rows, 1, wide, columns, width, target, width, smaller(STEPS, voxels - voxel),
                    true, nullptr);
      }
    }
  }
}

// The second kernel: inner products of R rows and four columns ---------------------------------------------------------

// Lane l of the result is the sum of one of four vectors, l modulo 4 saying which.
template <class V>
RSA_INLINE void add_sums(V a, V b, V c, V d, double* to, int count) {
  const auto fold = [](V x, V y) { return V::add(V::zip_low(x, y), V::zip_high(x, y)); };
  Of<V> lanes[V::N < 4 ? 4 : V::N];
  if (V::N >= 4) {
    V sums = fold(fold(a, c), fold(b, d));
    // Every lane group of four holds partial sums of a, b, c, d: halves are added until one group is left.
    for (int left = V::N; left > 4; left /= 2) sums = V::add(sums, V::upper_half(sums, left));
    sums.store(lanes);
  } else {
    fold(a, b).store(lanes);
    fold(c, d).store(lanes + 2);
  }
  for (int i = 0; i < count; ++i) to[i] += lanes[i];
}

template <class V>
using Dot = void (*)(const Panels<V>& panels, int64_t slices, int64_t positions, const Of<V>* rows, const Of<V>* columns,
                     int64_t row, int64_t column, int count, double* to);

// to[r][q] += <rows_{row + r}, columns_{column + q}>, q < count; where there are fewer columns the last one serves again.
// Sums of up to CHAIN terms a lane are rounded to T, those of such sums to double.
template <class V, int R>
void dot(const Panels<V>& panels, int64_t slices, int64_t positions, const Of<V>* rows, const Of<V>* columns,
         int64_t row, int64_t column, int count, double* to) {
  constexpr int64_t CHAIN = 96;
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t run = positions * panels.width(panel), offset = panels.start(panel) * slices * positions;
    const int64_t chains = (run / V::N + CHAIN - 1) / CHAIN, chain = (run / V::N + chains - 1) / chains * V::N;
    for (int64_t begin = 0; begin < run; begin += chain) {
      V sums[R][4];
      RSA_UNROLL for (int r = 0; r < R; ++r) {
        RSA_UNROLL for (int q = 0; q < 4; ++q) sums[r][q] = V::zero();
      }
      const Of<V>* left = rows + offset + row * run;
      const Of<V>* upper = left + 3 * run;
      const Of<V>* right[4];
      RSA_UNROLL for (int q = 0; q < 4; ++q) right[q] = columns + offset + (column + (q < count ? q : count - 1)) * run;
      const int64_t end = smaller(run, begin + chain);
      for (int64_t k = begin; k < end; k += V::N) {
        V factors[4];
        RSA_UNROLL for (int q = 0; q < 4; ++q) factors[q] = V::load(right[q] + k);
        RSA_UNROLL for (int r = 0; r < R; ++r) {
          const V factor = V::load((r < 3 ? left + r * run : upper + (r - 3) * run) + k);
          RSA_UNROLL for (int q = 0; q < 4; ++q) sums[r][q] = V::multiply_add(factor, factors[q], sums[r][q]);
        }
      }
      RSA_UNROLL for (int r = 0; r < R; ++r) {
        add_sums<V>(sums[r][0], sums[r][1], sums[r][2], sums[r][3], to + r * slices, count);
      }
    }
  }
}

// products[i][j] += <rows_i, columns_j> over all channels and positions of a tile.
template <class V>
void contract_tiles(const Panels<V>& panels, int64_t slices, int64_t positions, const Of<V>* rows, const Of<V>* columns,
                    double* products) {
  static constexpr Dot<V> table[6] = {dot<V, 1>, dot<V, 2>, dot<V, 3>, dot<V, V::DOT_ROWS >= 4 ? 4 : 1>,
                                      dot<V, V::DOT_ROWS >= 5 ? 5 : 1>, dot<V, V::DOT_ROWS >= 6 ? 6 : 1>};
  const int64_t block = balanced(slices, V::DOT_ROWS);
  for (int64_t row = 0; row < slices; row += block) {
    const Dot<V> kernel = table[smaller(block, slices - row) - 1];
    for (int64_t column = 0; column < slices; column += 4) {
      kernel(panels, slices, positions, rows, columns, row, column, static_cast<int>(smaller(4, slices - column)),
             products + row * slices + column);
    }
  }
}

// Between volumes and tiles --------------------------------------------------------------------------------------------

template <class V, class Stored>
RSA_INLINE V gather(const Stored* from, int64_t stride, int count) {
  if (stride == 1) return count == V::N ? V::load(from) : V::load(from, count);
  Of<V> lanes[V::N] = {};
  for (int i = 0; i < count; ++i) lanes[i] = widen<Of<V>>(from[i * stride]);
  return V::load(lanes);
}

template <class V, class Stored>
RSA_INLINE void scatter(V vector, Stored* to, int64_t stride, int count) {
  if (stride == 1) return count == V::N ? vector.store(to) : vector.store(to, count);
  Of<V> lanes[V::N];
  vector.store(lanes);
  for (int i = 0; i < count; ++i) narrow(lanes[i], to[i * stride]);
}

// How the voxels of a tile lie in a volume: in runs along the positions or along the slices, whichever are neighbours.
struct Runs {
  bool along_slices;
  int64_t stride;
  // Positions follow each other in rows of so many; the first one is here.
  int64_t length, outer, column;

  Runs(const Range& range, const View& view, int64_t begin) {
    along_slices = view.slice == 1 && view.inner != 1;
    stride = along_slices ? view.slice : view.inner;
    // Rows that follow each other in memory are one.
    length = !along_slices && view.outer == range.inner * view.inner ? range.end : range.inner;
    outer = begin / length;
    column = begin % length;
  }
};

// Calls visit(slice, position in the tile, offset in the volume, count) for runs that a vector can hold.
template <int N, class Visit>
RSA_INLINE void each_run(const Range& range, const View& view, const Runs& runs, int64_t positions, const Visit& visit) {
  if (runs.along_slices) {
    int64_t outer = runs.outer, column = runs.column;
    for (int64_t p = 0; p < positions; ++p) {
      const int64_t offset = outer * view.outer + column * view.inner;
      for (int64_t s = 0; s < range.slices; s += N) {
        visit(s, p, offset + s * view.slice, static_cast<int>(smaller(N, range.slices - s)));
      }
      if (++column == runs.length) column = 0, ++outer;
    }
    return;
  }
  for (int64_t s = 0; s < range.slices; ++s) {
    int64_t outer = runs.outer, column = runs.column;
    for (int64_t p = 0; p < positions;) {
      const int64_t count = smaller(smaller(N, positions - p), runs.length - column);
      visit(s, p, outer * view.outer + column * view.inner + s * view.slice, static_cast<int>(count));
      p += count;
      column += count;
      if (column == runs.length) column = 0, ++outer;
    }
  }
}

// From a slice to the next in a tile, in voxels. Slices that lie a power of two apart compete for the same places in a
// cache: where those are too few for all slices it is odd. What is left over is zero like the lanes beyond C, but for a
// bias that meets zeros only.
inline int64_t pitch(int64_t slices, int64_t positions) {
  constexpr int64_t PLACES = 128;
  const int64_t power = smaller(positions & -positions, 16);
  return slices * power <= PLACES ? positions : positions | 1;
}

// Calls visit(pointer into the volume, place in the tile, channel, slice, count) for vectors of channels, where those are
// neighbours in the volume.
template <class V, class Stored, class Visit>
RSA_INLINE void each_voxel(const Panels<V>& panels, const Range& range, const View& view, int64_t begin,
                           int64_t positions, int64_t step, const Visit& visit) {
  Stored* volume = static_cast<Stored*>(view.data);
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t start = panels.start(panel), width = panels.width(panel), filled = panels.filled(panel);
    for (int64_t s = 0; s < range.slices; ++s) {
      int64_t outer = begin / range.inner, column = begin % range.inner;
      int64_t at = (start * range.slices + s * width) * step;
      for (int64_t p = 0; p < positions; ++p, at += width) {
        Stored* voxel = volume + s * view.slice + outer * view.outer + column * view.inner + start;
        int64_t c = 0;
        for (; c + V::N <= filled; c += V::N) visit(voxel + c, at + c, start + c, s, V::N);
        if (c < filled) visit(voxel + c, at + c, start + c, s, static_cast<int>(filled - c));
        if (++column == range.inner) column = 0, ++outer;
      }
    }
  }
}

// Reads tiles of a volume, one after the other.
//
// A channels-first volume is copied first, and then turned: nothing but a copy, channel after channel, has as many lines
// on their way as the memory can send. The copy is of several tiles, so that it takes more than a line from every page.
template <class V, class Stored>
class Reader {
 public:
  static int64_t buffer_elements(int64_t slices, int64_t channels, int64_t positions) {
    const int64_t copied = rounded(copied_positions(slices, channels, positions));
    const int64_t rows = slices * copied, turned = copied * rounded(slices);
    return Panels<V>(channels).padded * ((rows > turned ? rows : turned) + V::N);
  }

  Reader(const Panels<V>& panels, const Range& range, const View& view, Of<V>* buffer)
      : panels_(panels), range_(range), view_(view), buffer_(buffer) {}

  // Positions [begin, begin + positions), which follow those of the call before.
  void read(int64_t begin, int64_t positions, Of<V>* tile) {
    const int64_t step = pitch(range_.slices, positions), voxels = range_.slices * step;
    if (step > positions) {
      for (int64_t panel = 0; panel < panels_.count; ++panel) {
        const int64_t width = panels_.width(panel);
        Of<V>* left_over = tile + panels_.start(panel) * voxels + positions * width;
        for (int64_t s = 0; s < range_.slices; ++s) std::memset(left_over + s * step * width, 0, width * sizeof(Of<V>));
      }
    }
    if (view_.channel == 1 && panels_.channels > 1) return read_voxels(begin, positions, step, tile);
    if (begin + positions > end_) {
      begin_ = begin;
      end_ = smaller(range_.end, begin + copied_positions(range_.slices, range_.channels, positions));
      copy();
    }
    const int64_t next = along_slices_ ? step : 1, other = along_slices_ ? 1 : step;
    const int64_t lines = along_slices_ ? positions : range_.slices, length = along_slices_ ? range_.slices : positions;
    const Of<V>* from = buffer_ + (begin - begin_) * (along_slices_ ? row_ : 1);
    for (int64_t line = 0; line < lines; ++line) {
      for (int64_t c = 0; c < panels_.padded; c += V::N) {
        const int64_t panel = c / Panels<V>::WIDTH, width = panels_.width(panel);
        Of<V>* target = tile + panels_.start(panel) * voxels + line * other * width + (c - panels_.start(panel));
        for (int64_t at = 0; at < length; at += V::N) {
          V square[V::N];
          V::turn(from + c * channel_ + line * row_ + at, channel_, square);
          Of<V>* to = target + at * next * width;
          const int64_t left = length - at;
          RSA_UNROLL for (int i = 0; i < V::N; ++i) {
            if (i < left) square[i].store(to + i * next * width);
          }
        }
      }
    }
  }

 private:
  // Positions of a copy: a tile's, or four lines of memory if those are within so many bytes.
  static int64_t copied_positions(int64_t slices, int64_t channels, int64_t positions) {
    constexpr int64_t BYTES = 768 << 10, MOST = 64;
    const int64_t fitting = smaller(MOST, BYTES / (slices * channels * static_cast<int64_t>(sizeof(Of<V>))));
    return positions > fitting ? positions : fitting;
  }

  static int64_t rounded(int64_t length) { return (length + V::N - 1) / V::N * V::N; }

  // A volume whose channels are neighbours is as a tile is.
  void read_voxels(int64_t begin, int64_t positions, int64_t step, Of<V>* tile) {
    each_voxel<V, Stored>(panels_, range_, view_, begin, positions, step,
                          [&](const Stored* from, int64_t at, int64_t, int64_t, int count) {
                            gather<V>(from, 1, count).store(tile + at);
                          });
  }

  // Copies positions [begin_, end_): [channel][slice][position], or [channel][position][slice].
  void copy() {
    const int64_t positions = end_ - begin_;
    const Runs runs(range_, view_, begin_);
    along_slices_ = runs.along_slices;
    row_ = rounded(along_slices_ ? range_.slices : positions);
    channel_ = (along_slices_ ? positions : range_.slices) * row_ + V::N;
    for (int64_t c = 0; c < panels_.channels; ++c) {
      const Stored* from = static_cast<const Stored*>(view_.data) + c * view_.channel;
      Of<V>* to = buffer_ + c * channel_;
      each_run<V::N>(range_, view_, runs, positions, [&](int64_t s, int64_t p, int64_t offset, int count) {
        gather<V>(from + offset, runs.stride, count).store(to + (along_slices_ ? p * row_ + s : s * row_ + p));
      });
    }
    std::memset(buffer_ + panels_.channels * channel_, 0,
                (panels_.padded - panels_.channels) * channel_ * sizeof(Of<V>));
  }

  const Panels<V>& panels_;
  const Range& range_;
  const View view_;
  Of<V>* buffer_;
  int64_t begin_ = 0, end_ = -1, row_ = 0, channel_ = 0;
  bool along_slices_ = false;
};

// Writes a tile back, with coefficients[slice] * values[channel] added on the way (coefficients null: 1; values null: 0).
template <class V, class Stored>
void unpack(const Panels<V>& panels, const Range& range, const View& view, int64_t begin, int64_t positions,
            const Of<V>* tile, const Of<V>* values, const Of<V>* coefficients) {
  Stored* volume = static_cast<Stored*>(view.data);
  const int64_t step = pitch(range.slices, positions), voxels = range.slices * step;
  if (view.channel == 1 && panels.channels > 1) {
    return each_voxel<V, Stored>(panels, range, view, begin, positions, step,
                                 [&](Stored* to, int64_t at, int64_t channel, int64_t slice, int count) {
                                   V voxel = V::load(tile + at);
                                   if (values) {
                                     const V coefficient = V::set(coefficients ? coefficients[slice] : 1);
                                     voxel = V::multiply_add(coefficient, V::load(values + channel), voxel);
                                   }
                                   scatter<V>(voxel, to, 1, count);
                                 });
  }
  const Runs run(range, view, begin);
  const int64_t next = run.along_slices ? step : 1;
  each_run<V::N>(range, view, run, positions, [&](int64_t s, int64_t p, int64_t offset, int count) {
    V coefficient = V::set(1);
    if (coefficients) coefficient = run.along_slices ? V::load(coefficients + s, count) : V::set(coefficients[s]);
    for (int64_t c = 0; c < panels.channels; c += V::N) {
      const int64_t panel = c / Panels<V>::WIDTH, width = panels.width(panel);
      V square[V::N];
      V::turn(tile + panels.start(panel) * voxels + (s * step + p) * width + (c - panels.start(panel)), next * width,
              square);
      Stored* to = volume + offset + c * view.channel;
      const int64_t channels = panels.channels - c;
      RSA_UNROLL for (int i = 0; i < V::N; ++i) {
        if (i < channels) {
          const V voxels = values ? V::multiply_add(coefficient, V::set(values[c + i]), square[i]) : square[i];
          scatter<V>(voxels, to + i * view.channel, run.stride, count);
        }
      }
    }
  });
}

// totals (C) += sum over voxels of coefficients[slice] * tile; coefficients null: 1. In double from slice to slice.
template <class V>
void add_voxels(const Panels<V>& panels, int64_t slices, int64_t positions, const Of<V>* tile,
                const Of<V>* coefficients, double* totals) {
  for (int64_t c = 0; c < panels.padded; c += V::N) {
    const int64_t panel = c / Panels<V>::WIDTH, width = panels.width(panel);
    const Of<V>* from = tile + panels.start(panel) * slices * positions + (c - panels.start(panel));
    for (int64_t s = 0; s < slices; ++s) {
      V sum = V::zero();
      for (int64_t p = 0; p < positions; ++p, from += width) sum = V::add(sum, V::load(from));
      Of<V> lanes[V::N];
      sum.store(lanes);
      const double coefficient = coefficients ? static_cast<double>(coefficients[s]) : 1;
      for (int i = 0; i < V::N; ++i) totals[c + i] += coefficient * lanes[i];
    }
  }
}

// The passes -----------------------------------------------------------------------------------------------------------

template <class V, class Stored>
struct Kernels {
  using T = Of<V>;

  // Bytes of a tile: two or three of them, and a block of weights, fit the second cache.
  static constexpr int64_t TILE = 256 << 10;

  static int64_t tile_positions(int64_t slices, int64_t channels) {
    const int64_t fitting = TILE / (slices * Panels<V>(channels).padded * static_cast<int64_t>(sizeof(T)));
    return fitting >= LINE ? fitting / LINE * LINE : fitting < 1 ? 1 : fitting;
  }

  // Positions in the longest tile: a short one may hold half as many again as it should, see each_tile.
  static int64_t longest(int64_t tile) { return tile >= LINE ? tile : tile + tile / 2 + 1; }

  static int64_t tile_elements(int64_t slices, int64_t channels, int64_t tile) {
    return slices * Panels<V>(channels).padded * (longest(tile) | 1);
  }

  static int64_t copy_elements(int64_t slices, int64_t channels, int64_t tile) {
    return Reader<V, Stored>::buffer_elements(slices, channels, longest(tile));
  }

  // Forward passes need one half of the buffers. Past the last one lines may be read, though not used.
  static int64_t scratch_elements(int64_t slices, int64_t channels, int64_t tile, bool backward) {
    const int64_t half = 2 * tile_elements(slices, channels, tile) + copy_elements(slices, channels, tile);
    return (backward ? 2 : 1) * half + V::N * (slices + 2) * Panels<V>::WIDTH;
  }

  static int64_t panel_elements(int64_t channels) { return channels * Panels<V>(channels).padded; }

  // The scratch of a pass; what a forward pass needs comes first.
  struct Buffers {
    T *tiles[4], *copies[2];
    Buffers(const Range& range, void* scratch) {
      const int64_t tile = tile_elements(range.slices, range.channels, range.tile);
      T* next = static_cast<T*>(scratch);
      for (int half = 0; half < 2; ++half) {
        tiles[2 * half] = next;
        tiles[2 * half + 1] = next + tile;
        copies[half] = next + 2 * tile;
        next = copies[half] + copy_elements(range.slices, range.channels, range.tile);
      }
    }
  };

  // Visits the tiles of a range, about equal ones, of whole lines if they are that long.
  template <class Visit>
  static RSA_INLINE void each_tile(const Range& range, const Visit& visit) {
    const int64_t unit = range.tile >= LINE ? LINE : 1;
    const int64_t units = (range.end - range.begin + unit - 1) / unit, most = range.tile / unit;
    const int64_t tiles = unit == 1 ? (units + most / 2) / most : (units + most - 1) / most;
    const int64_t count = tiles > 1 ? tiles : 1;
    const auto edge = [&](int64_t tile) { return smaller(range.end, range.begin + units * tile / count * unit); };
    for (int64_t tile = 0; tile < count; ++tile) visit(edge(tile), edge(tile + 1) - edge(tile));
  }

  static void map(const Range& range, View x, const void* m, const void* u, double* logits, void* scratch) {
    const Panels<V> panels(range.channels);
    const Buffers buffers(range, scratch);
    T *tile = buffers.tiles[0], *query = buffers.tiles[1];
    Reader<V, Stored> x_reader(panels, range, x, buffers.copies[0]);
    each_tile(range, [&](int64_t begin, int64_t positions) {
      const int64_t places = pitch(range.slices, positions), voxels = range.slices * places;
      x_reader.read(begin, positions, tile);
      project_tile<V>(panels, voxels, 0, voxels, tile, static_cast<const T*>(m), query, false, static_cast<const T*>(u));
      contract_tiles<V>(panels, range.slices, places, query, tile, logits);
    });
  }

  static void mix(const Range& range, View x, const void* attention, const void* value, const void* bias, View out,
                  void* scratch) {
    const Panels<V> panels(range.channels);
    const Buffers buffers(range, scratch);
    T *tile = buffers.tiles[0], *mixed = buffers.tiles[1];
    Reader<V, Stored> x_reader(panels, range, x, buffers.copies[0]);
    each_tile(range, [&](int64_t begin, int64_t positions) {
      const int64_t places = pitch(range.slices, positions), voxels = range.slices * places;
      x_reader.read(begin, positions, tile);
      mix_tile<V>(panels, range.slices, places, static_cast<const T*>(attention), range.slices, 1, tile, mixed, false);
      project_tile<V>(panels, voxels, 0, voxels, mixed, static_cast<const T*>(value), tile, true, nullptr);
      unpack<V, Stored>(panels, range, out, begin, positions, tile, static_cast<const T*>(bias), nullptr);
    });
  }

  static void map_backward(const Range& range, View x, View grad, const void* attention, const void* value_transposed,
                           double* products, double* grad_sum, void* value_grad, View out, void* scratch) {
    const Panels<V> panels(range.channels);
    const Buffers buffers(range, scratch);
    T *tile = buffers.tiles[0], *total = buffers.tiles[1], *value = buffers.tiles[2], *mixed = buffers.tiles[3];
    const T* matrix = static_cast<const T*>(attention);
    Reader<V, Stored> x_reader(panels, range, x, buffers.copies[0]);
    Reader<V, Stored> grad_reader(panels, range, grad, buffers.copies[1]);
    each_tile(range, [&](int64_t begin, int64_t positions) {
      const int64_t places = pitch(range.slices, positions), voxels = range.slices * places;
      x_reader.read(begin, positions, tile);
      grad_reader.read(begin, positions, total);
      add_voxels<V>(panels, range.slices, places, total, nullptr, grad_sum);
      project_tile<V>(panels, voxels, 0, voxels, total, static_cast<const T*>(value_transposed), value, false, nullptr);
      contract_tiles<V>(panels, range.slices, places, value, tile, products);
      if (value_grad) {
        mix_tile<V>(panels, range.slices, places, matrix, range.slices, 1, tile, mixed, false);
        correlate_tiles<V>(panels, voxels, 0, range.channels, total, mixed, static_cast<T*>(value_grad));
      }
      if (out.data) {
        mix_tile<V>(panels, range.slices, places, matrix, 1, range.slices, value, total, true);
        unpack<V, Stored>(panels, range, out, begin, positions, total, nullptr, nullptr);
      }
    });
  }

  static void mix_backward(const Range& range, View x, View partial, const void* grad_logits, const void* column,
                           const void* m, const void* m_transposed, const void* u, void* m_grad, double* u_grad,
                           View out, void* scratch) {
    const Panels<V> panels(range.channels);
    const Buffers buffers(range, scratch);
    T *tile = buffers.tiles[0], *total = buffers.tiles[1], *mixed = buffers.tiles[2];
    const T *matrix = static_cast<const T*>(grad_logits), *coefficients = static_cast<const T*>(column);
    Reader<V, Stored> x_reader(panels, range, x, buffers.copies[0]);
    Reader<V, Stored> partial_reader(panels, range, partial, buffers.copies[1]);
    each_tile(range, [&](int64_t begin, int64_t positions) {
      const int64_t places = pitch(range.slices, positions), voxels = range.slices * places;
      x_reader.read(begin, positions, tile);
      mix_tile<V>(panels, range.slices, places, matrix, range.slices, 1, tile, mixed, false);
      if (m_grad) {
        correlate_tiles<V>(panels, voxels, 0, range.channels, tile, mixed, static_cast<T*>(m_grad));
        add_voxels<V>(panels, range.slices, places, tile, coefficients, u_grad);
      }
      if (out.data) {
        partial_reader.read(begin, positions, total);
        project_tile<V>(panels, voxels, 0, voxels, mixed, static_cast<const T*>(m_transposed), total, true, nullptr);
        mix_tile<V>(panels, range.slices, places, matrix, 1, range.slices, tile, mixed, false);
        project_tile<V>(panels, voxels, 0, voxels, mixed, static_cast<const T*>(m), total, true, nullptr);
        unpack<V, Stored>(panels, range, out, begin, positions, total, static_cast<const T*>(u), coefficients);
      }
    });
  }

  static void contract(const Range& range, View left, View right, double* products, void* scratch) {
    const Panels<V> panels(range.channels);
    const Buffers buffers(range, scratch);
    Reader<V, Stored> left_reader(panels, range, left, buffers.copies[0]);
    Reader<V, Stored> right_reader(panels, range, right, buffers.copies[1]);
    each_tile(range, [&](int64_t begin, int64_t positions) {
      const int64_t places = pitch(range.slices, positions);
      left_reader.read(begin, positions, buffers.tiles[0]);
      right_reader.read(begin, positions, buffers.tiles[1]);
      contract_tiles<V>(panels, range.slices, places, buffers.tiles[0], buffers.tiles[1], products);
    });
  }

  static void mix_slices(const Range& range, View x, const void* matrix, bool transposed, View out, void* scratch) {
    const Panels<V> panels(range.channels);
    const Buffers buffers(range, scratch);
    const int64_t row = transposed ? 1 : range.slices, column = transposed ? range.slices : 1;
    Reader<V, Stored> x_reader(panels, range, x, buffers.copies[0]);
    each_tile(range, [&](int64_t begin, int64_t positions) {
      const int64_t places = pitch(range.slices, positions);
      x_reader.read(begin, positions, buffers.tiles[0]);
      mix_tile<V>(panels, range.slices, places, static_cast<const T*>(matrix), row, column, buffers.tiles[0],
               buffers.tiles[1], false);
      unpack<V, Stored>(panels, range, out, begin, positions, buffers.tiles[1], nullptr, nullptr);
    });
  }

  // A matrix in panels of columns: [panel][row][column], columns beyond C zero.
  static void pack_matrix(int64_t channels, int64_t begin, int64_t end, const void* matrix, bool transposed, void* to) {
    const Panels<V> panels(channels);
    const T* from = static_cast<const T*>(matrix);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t width = panels.width(panel), start = panels.start(panel);
      T* rows = static_cast<T*>(to) + start * channels;
      int64_t row = begin;
      if (transposed && panels.filled(panel) == width) {
        for (; row + V::N <= end; row += V::N) {
          for (int64_t lane = 0; lane < width; lane += V::N) {
            V square[V::N];
            V::turn(from + (start + lane) * channels + row, channels, square);
            for (int i = 0; i < V::N; ++i) square[i].store(rows + (row + i) * width + lane);
          }
        }
      }
      for (; row < end; ++row) {
        for (int64_t lane = 0; lane < width; ++lane) {
          const int64_t column = start + lane;
          const int64_t at = transposed ? column * channels + row : row * channels + column;
          rows[row * width + lane] = column < channels ? from[at] : 0;
        }
      }
    }
  }

  static void unpack_matrix(int64_t channels, int64_t begin, int64_t end, const void* from, void* matrix) {
    const Panels<V> panels(channels);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t width = panels.width(panel), start = panels.start(panel);
      const T* rows = static_cast<const T*>(from) + start * channels;
      for (int64_t row = begin; row < end; ++row) {
        std::memcpy(static_cast<T*>(matrix) + row * channels + start, rows + row * width,
                    panels.filled(panel) * sizeof(T));
      }
    }
  }

  static void correlate(int64_t channels, int64_t begin, int64_t end, const void* left, const void* right,
                        void* total) {
    correlate_tiles<V>(Panels<V>(channels), channels, begin, end, static_cast<const T*>(left),
                   static_cast<const T*>(right), static_cast<T*>(total));
  }

  static void project(int64_t channels, int64_t begin, int64_t end, const void* rows, const void* weights, void* out) {
    project_tile<V>(Panels<V>(channels), channels, begin, end, static_cast<const T*>(rows),
                 static_cast<const T*>(weights), static_cast<T*>(out), false, nullptr);
  }

  static constexpr rsa::Passes passes() {
    using Norm = ::Norm<V, Stored>;
    return {map,         mix,           map_backward,        mix_backward,   contract,  mix_slices,
            nullptr,     nullptr,
            pack_matrix, unpack_matrix, correlate,           project,        Norm::sums, Norm::apply,
            Norm::backward_sums,        Norm::backward,      sizeof(T),      panel_elements,
            scratch_elements,           tile_positions};
  }
};

// The table of one instruction set.
template <class Float, class Double>
const rsa::Passes& passes_of(rsa::Element element) {
  static constexpr rsa::Passes float64 = Kernels<Double, double>::passes();
  static constexpr rsa::Passes float32 = Kernels<Float, float>::passes();
  static constexpr rsa::Passes bfloat16 = Kernels<Float, BFloat16>::passes();
  static constexpr rsa::Passes float16 = Kernels<Float, Float16>::passes();
  switch (element) {
    case rsa::Element::kFloat64: return float64;
    case rsa::Element::kFloat32: return float32;
    case rsa::Element::kBFloat16: return bfloat16;
    default: return float16;
  }
}

}  // namespace
