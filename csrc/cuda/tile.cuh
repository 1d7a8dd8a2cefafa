// Tiles in shared memory: how they are filled, and how they are multiplied.
#pragma once

#include "index.cuh"
#include "numbers.cuh"

namespace rsa {

template <typename T>
struct alignas(16) Vector {
  static constexpr int size = 16 / static_cast<int>(sizeof(T));
  T at[size];
};

// Where a thread finds its column of a tile; rows are a constant number of elements apart.
template <typename T>
struct Place {
  const T* first;
  bool exists;
};

// Slices of a volume from `slice` on, by columns from `start` on.
template <typename T>
struct SliceRows {
  const T* volume;
  const Geometry& shape;
  int64_t row, sample, slice, start;

  RSA_DEVICE Place<T> column(int k) const {
    const Column column = column_at(shape, start + k);
    return {volume + element(shape, row, sample, slice, column), column.exists};
  }
  RSA_DEVICE bool exists(int index) const { return slice + index < shape.slices; }
  RSA_DEVICE int64_t step() const { return shape.slice * row; }
  RSA_DEVICE const T* anywhere() const { return volume; }
};

// Rows of a padded map from `row` on, by columns from `start` on.
template <typename T>
struct MapRows {
  const T* matrix;
  int64_t padded, sample, row, start;

  RSA_DEVICE Place<T> column(int k) const {
    return {matrix + (sample * padded + row) * padded + start + k, start + k < padded};
  }
  RSA_DEVICE bool exists(int index) const { return row + index < padded; }
  RSA_DEVICE int64_t step() const { return padded; }
  RSA_DEVICE const T* anywhere() const { return matrix; }
};

// Fills ROWS rows of BYTES, STRIDE apart; zeros where the source has nothing. Neighbouring threads copy neighbours.
template <int WIDTH, int ROWS, int BYTES, int STRIDE, int THREADS, typename T, template <typename> class Source>
RSA_DEVICE void fill_by(char* tile, const Source<T>& source) {
  constexpr int in_row = BYTES / WIDTH;
  constexpr int together = THREADS / in_row;
  static_assert(together >= 1 && THREADS % in_row == 0, "a row is filled at once");
  const int unit = thread_index() % in_row;
  const Place<T> column = source.column(unit * WIDTH / static_cast<int>(sizeof(T)));
  // Narrow copies are many, and all their addresses at once would not fit registers.
  constexpr int at_once = WIDTH == 16 ? 4 : 2;
  RSA_UNROLL_BY(at_once)
  for (int first = 0; first < ROWS; first += together) {
    const int row = first + thread_index() / in_row;
    if (ROWS % together == 0 || row < ROWS) {
      const bool exists = column.exists && source.exists(row);
      const T* from = exists ? column.first + row * source.step() : source.anywhere();
      char* to = tile + row * STRIDE + unit * WIDTH;
      if constexpr (WIDTH >= 4) {
        copy_async<WIDTH>(to, from, exists);
      } else {
        *reinterpret_cast<T*>(to) = exists ? *from : T{};
      }
    }
  }
}

// `width` bytes at a time: 16, one number, or 4 (see width_of).
template <int ROWS, int BYTES, int STRIDE, int THREADS, typename T, template <typename> class Source>
RSA_DEVICE void fill(char* tile, const Source<T>& source, int width) {
  constexpr int number = static_cast<int>(sizeof(T));
  if (width == 16) {
    fill_by<16, ROWS, BYTES, STRIDE, THREADS>(tile, source);
  } else if (width == number) {
    fill_by<number, ROWS, BYTES, STRIDE, THREADS>(tile, source);
  } else if constexpr (number < 4) {
    fill_by<4, ROWS, BYTES, STRIDE, THREADS>(tile, source);
  }
}

// Products of a block whose threads hold the sum: WARPS_M x WARPS_N warps, of TILES_M x TILES_N fragments of 16 x 8.
template <typename T, int WARPS_M, int WARPS_N, int TILES_M, int TILES_N>
struct TensorProduct {
  static constexpr int threads = WARPS_M * WARPS_N * 32;
  static constexpr int rows = WARPS_M * TILES_M * 16, columns = WARPS_N * TILES_N * 8;
  static constexpr int step = 32 / static_cast<int>(sizeof(T));  // what an instruction sums over
  static constexpr int right_padding = sizeof(T) == 4 ? 32 : 16;
  static_assert(TILES_N % 2 == 0, "right operands are loaded in twos");

  float sum[TILES_M][TILES_N][4];

  RSA_DEVICE static int lane() { return thread_index() % 32; }
  RSA_DEVICE static int warp_row() { return thread_index() / 32 / WARPS_N * TILES_M * 16; }
  RSA_DEVICE static int warp_column() { return thread_index() / 32 % WARPS_N * TILES_N * 8; }

  RSA_DEVICE void clear() {
    RSA_UNROLL
    for (int m = 0; m < TILES_M; ++m) {
      RSA_UNROLL
      for (int n = 0; n < TILES_N; ++n) {
        RSA_UNROLL
        for (int e = 0; e < 4; ++e) sum[m][n][e] = 0;
      }
    }
  }

  RSA_DEVICE static void round_fragment(uint32_t* fragment, int size) {
    if constexpr (sizeof(T) == 4) {
      RSA_UNROLL
      for (int e = 0; e < size; ++e) fragment[e] = nearest_tf32(fragment[e]);
    }
  }

  RSA_DEVICE static void load_left(uint32_t (&fragment)[TILES_M][4], const char* tile, int stride, int byte) {
    RSA_UNROLL
    for (int m = 0; m < TILES_M; ++m) {
      const int row = warp_row() + m * 16 + left_row(lane());
      load_matrices(fragment[m], tile + row * stride + byte + left_byte(lane()));
      round_fragment(fragment[m], 4);
    }
  }

  // sum += left right^T: rows of both run over what is summed.
  template <int BYTES, int STRIDE>
  RSA_DEVICE void contract(const char* left_tile, const char* right_tile) {
    // Unrolled further, two blocks of 128 x 128 tiles would not fit the registers of a processor.
    constexpr int at_once = 2;
    RSA_UNROLL_BY(at_once)
    for (int byte = 0; byte < BYTES; byte += 32) {
      uint32_t left[TILES_M][4];
      load_left(left, left_tile, STRIDE, byte);
      RSA_UNROLL
      for (int n = 0; n < TILES_N; n += 2) {
        uint32_t right[4];
        const int row = warp_column() + n * 8 + right_row(lane());
        load_matrices(right, right_tile + row * STRIDE + byte + right_byte(lane()));
        round_fragment(right, 4);
        RSA_UNROLL
        for (int m = 0; m < TILES_M; ++m) {
          multiply_fragments(sum[m][n], left[m], right, T{});
          multiply_fragments(sum[m][n + 1], left[m], right + 2, T{});
        }
      }
    }
  }

  // sum += left right over `depth` rows of the right tile, a multiple of 16.
  template <int DEPTH, int LEFT_STRIDE, int RIGHT_STRIDE>
  RSA_DEVICE void multiply(const char* left_tile, const char* right_tile, int depth) {
    RSA_UNROLL
    for (int first = 0; first < DEPTH; first += step) {
      if (first >= depth) break;
      uint32_t left[TILES_M][4];
      load_left(left, left_tile, LEFT_STRIDE, first * static_cast<int>(sizeof(T)));
      RSA_UNROLL
      for (int n = 0; n < TILES_N; n += 2) {
        uint32_t right[4];
        const int column = warp_column() + n * 8;
        if constexpr (sizeof(T) == 2) {
          const char* row = right_tile + (first + summed_row(lane())) * RIGHT_STRIDE;
          load_matrices_transposed(right, row + column * 2 + summed_byte(lane()));
        } else {
          RSA_UNROLL
          for (int e = 0; e < 4; ++e) {
            const char* row = right_tile + (first + lane() % 4 + e % 2 * 4) * RIGHT_STRIDE;
            right[e] = *reinterpret_cast<const uint32_t*>(row + (column + e / 2 * 8 + lane() / 4) * 4);
          }
          round_fragment(right, 4);
        }
        RSA_UNROLL
        for (int m = 0; m < TILES_M; ++m) {
          multiply_fragments(sum[m][n], left[m], right, T{});
          multiply_fragments(sum[m][n + 1], left[m], right + 2, T{});
        }
      }
    }
  }

  // Calls use(row, column, value) for all that this thread holds.
  template <typename Use>
  RSA_DEVICE void each(const Use& use) const {
    RSA_UNROLL
    for (int m = 0; m < TILES_M; ++m) {
      RSA_UNROLL
      for (int n = 0; n < TILES_N; ++n) {
        RSA_UNROLL
        for (int e = 0; e < 4; ++e) {
          use(warp_row() + m * 16 + sum_row(lane(), e), warp_column() + n * 8 + sum_column(lane(), e), sum[m][n][e]);
        }
      }
    }
  }

  // The sum as runs of neighbouring columns, which vectors can store: `held` rows of `run` numbers a thread.
  static constexpr int held = TILES_M * 2, run = 8;
  RSA_DEVICE static int run_row(int index) { return warp_row() + index * 8 + lane() / 4; }
  RSA_DEVICE static int run_column() { return warp_column() + lane() % 4 * 8; }

  // Four lanes hold two columns each of four fragments; afterwards each holds the eight of one. Two rounds of exchange.
  RSA_DEVICE void runs(float (&values)[held][run]) const {
    static_assert(TILES_N == 4, "four lanes share four fragments");
    RSA_UNROLL
    for (int index = 0; index < held; ++index) {
      float(&row)[run] = values[index];
      RSA_UNROLL
      for (int n = 0; n < 4; ++n) {
        row[2 * n] = sum[index / 2][n][index % 2 * 2];
        row[2 * n + 1] = sum[index / 2][n][index % 2 * 2 + 1];
      }
      RSA_UNROLL
      for (int bit = 1; bit <= 2; bit *= 2) {
        const bool upper = (lane() & bit) != 0;
        RSA_UNROLL
        for (int e = 0; e < run; ++e) {
          if ((e / 2 & bit) == 0) {
            const int other = e + 2 * bit;
            const float received = exchange(upper ? row[e] : row[other], bit);
            row[e] = upper ? received : row[e];
            row[other] = upper ? row[other] : received;
          }
        }
      }
    }
  }
};

// The same for numbers without tensor cores: threads are THREADS_M x THREADS_N, a thread holds HELD_M x HELD_N.
template <typename T, int THREADS_M, int THREADS_N, int HELD_M, int HELD_N>
struct ScalarProduct {
  static constexpr int threads = THREADS_M * THREADS_N;
  static constexpr int rows = THREADS_M * HELD_M, columns = THREADS_N * HELD_N;
  static constexpr int right_padding = 16;
  static constexpr int vector = Vector<T>::size;

  T sum[HELD_M][HELD_N];

  RSA_DEVICE static int thread_row() { return thread_index() / THREADS_N; }
  RSA_DEVICE static int thread_column() { return thread_index() % THREADS_N; }

  RSA_DEVICE void clear() {
    RSA_UNROLL
    for (int m = 0; m < HELD_M; ++m) {
      RSA_UNROLL
      for (int n = 0; n < HELD_N; ++n) sum[m][n] = 0;
    }
  }

  RSA_DEVICE static Vector<T> load(const char* tile, int byte) {
    Vector<T> result;
    load_16_bytes(&result, tile + byte);
    return result;
  }

  // A thread's rows and columns are THREADS_M and THREADS_N apart, so that neighbours read neighbouring rows.
  template <int BYTES, int STRIDE>
  RSA_DEVICE void contract(const char* left_tile, const char* right_tile) {
    RSA_UNROLL_BY(1)
    for (int byte = 0; byte < BYTES; byte += 16) {
      Vector<T> left[HELD_M];
      RSA_UNROLL
      for (int m = 0; m < HELD_M; ++m) left[m] = load(left_tile, (thread_row() + m * THREADS_M) * STRIDE + byte);
      RSA_UNROLL
      for (int n = 0; n < HELD_N; ++n) {
        const Vector<T> right = load(right_tile, (thread_column() + n * THREADS_N) * STRIDE + byte);
        RSA_UNROLL
        for (int m = 0; m < HELD_M; ++m) {
          RSA_UNROLL
          for (int e = 0; e < vector; ++e) sum[m][n] = multiply_add(left[m].at[e], right.at[e], sum[m][n]);
        }
      }
    }
  }

  // A thread's columns are neighbours here, and fill one vector.
  template <int DEPTH, int LEFT_STRIDE, int RIGHT_STRIDE>
  RSA_DEVICE void multiply(const char* left_tile, const char* right_tile, int depth) {
    static_assert(HELD_N == vector, "a thread's columns are one vector");
    RSA_UNROLL_BY(1)
    for (int first = 0; first < DEPTH; first += vector) {
      if (first >= depth) break;
      Vector<T> left[HELD_M];
      RSA_UNROLL
      for (int m = 0; m < HELD_M; ++m) {
        left[m] = load(left_tile, run_row(m) * LEFT_STRIDE + first * static_cast<int>(sizeof(T)));
      }
      RSA_UNROLL
      for (int e = 0; e < vector; ++e) {
        const Vector<T> right = load(right_tile, (first + e) * RIGHT_STRIDE + thread_column() * 16);
        RSA_UNROLL
        for (int m = 0; m < HELD_M; ++m) {
          RSA_UNROLL
          for (int n = 0; n < HELD_N; ++n) sum[m][n] = multiply_add(left[m].at[e], right.at[n], sum[m][n]);
        }
      }
    }
  }

  template <typename Use>
  RSA_DEVICE void each(const Use& use) const {
    RSA_UNROLL
    for (int m = 0; m < HELD_M; ++m) {
      RSA_UNROLL
      for (int n = 0; n < HELD_N; ++n) use(thread_row() + m * THREADS_M, thread_column() + n * THREADS_N, sum[m][n]);
    }
  }

  static constexpr int held = HELD_M, run = HELD_N;
  RSA_DEVICE static int run_row(int index) { return thread_row() + index * THREADS_M; }
  RSA_DEVICE static int run_column() { return thread_column() * HELD_N; }

  RSA_DEVICE void runs(T (&values)[held][run]) const {
    RSA_UNROLL
    for (int m = 0; m < HELD_M; ++m) {
      RSA_UNROLL
      for (int n = 0; n < HELD_N; ++n) values[m][n] = sum[m][n];
    }
  }
};

}  // namespace rsa
