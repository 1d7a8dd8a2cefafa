// Group norm, and a ReLU after it: passes over rows of a (voxels, channels) matrix of neighbours.
#pragma once

#include "storage.h"

namespace {

template <class V, class Stored>
struct Norm {
  using T = typename V::T;
  // Rows whose sums are kept in the accumulation type before they go to double.
  static constexpr int64_t FLUSH = 32;

  template <int Vectors, bool Whole>
  struct Chunk {
    static constexpr int VECTORS = Vectors;
    int64_t start, lanes;
    template <class Any>
    V load(const Any* from, int vector) const {
      if constexpr (Whole) return V::load(from + start + vector * V::N);
      return V::load(from + start, static_cast<int>(lanes));
    }
    template <class Any>
    void store(V value, Any* to, int vector) const {
      if constexpr (Whole) return value.store(to + start + vector * V::N);
      value.store(to + start, static_cast<int>(lanes));
    }
  };

  // Calls body(chunk) for chunks of four vectors of channels, of one, and of what is left.
  template <class Body>
  static RSA_INLINE void each_chunk(int64_t channels, const Body& body) {
    int64_t start = 0;
    for (; start + 4 * V::N <= channels; start += 4 * V::N) body(Chunk<4, true>{start, V::N});
    for (; start + 2 * V::N <= channels; start += 2 * V::N) body(Chunk<2, true>{start, V::N});
    for (; start + V::N <= channels; start += V::N) body(Chunk<1, true>{start, V::N});
    if (start < channels) body(Chunk<1, false>{start, channels - start});
  }

  // Two sums for each channel of a chunk over rows, added to sums (2, C): add(row, vector, first, second) does a row's.
  template <class C, class Add>
  static RSA_INLINE void sum_rows(const C& chunk, int64_t channels, int64_t rows, double* sums, const Add& add) {
    // Two rows at once: each sum waits for the one before it.
    V first[2][C::VECTORS], second[2][C::VECTORS];
    RSA_UNROLL for (int v = 0; v < C::VECTORS; ++v) first[0][v] = first[1][v] = second[0][v] = second[1][v] = V::zero();
    int64_t row = 0;
    for (; row + 2 <= rows; row += 2) {
      RSA_UNROLL for (int v = 0; v < C::VECTORS; ++v) add(row, v, first[0][v], second[0][v]);
      RSA_UNROLL for (int v = 0; v < C::VECTORS; ++v) add(row + 1, v, first[1][v], second[1][v]);
    }
    if (row < rows) {
      RSA_UNROLL for (int v = 0; v < C::VECTORS; ++v) add(row, v, first[0][v], second[0][v]);
    }
    RSA_UNROLL for (int v = 0; v < C::VECTORS; ++v) {
      T lanes[2][V::N];
      V::add(first[0][v], first[1][v]).store(lanes[0]);
      V::add(second[0][v], second[1][v]).store(lanes[1]);
      double* to = sums + chunk.start + v * V::N;
      for (int64_t lane = 0; lane < chunk.lanes; ++lane) to[lane] += lanes[0][lane], to[channels + lane] += lanes[1][lane];
    }
  }

  template <class Body>
  static RSA_INLINE void each_block(int64_t rows, const Body& body) {
    for (int64_t begin = 0; begin < rows; begin += FLUSH) body(begin, begin + FLUSH < rows ? FLUSH : rows - begin);
  }

  static void sums(int64_t channels, int64_t rows, const void* x_data, const void* minus_data, double* sums) {
    const T* minus = static_cast<const T*>(minus_data);
    each_block(rows, [&](int64_t begin, int64_t count) {
      const Stored* x = static_cast<const Stored*>(x_data) + begin * channels;
      each_chunk(channels, [&](auto chunk) {
        sum_rows(chunk, channels, count, sums, [&](int64_t row, int v, V& first, V& second) {
          const V apart = V::add(chunk.load(x + row * channels, v), chunk.load(minus, v));
          first = V::add(first, apart);
          second = V::multiply_add(apart, apart, second);
        });
      });
    });
  }

  static void apply(int64_t channels, int64_t rows, const void* x_data, const void* scale_data, const void* shift_data,
                    bool relu, void* out_data) {
    const T *scale = static_cast<const T*>(scale_data), *shift = static_cast<const T*>(shift_data);
    each_block(rows, [&](int64_t begin, int64_t count) {
      const Stored* x = static_cast<const Stored*>(x_data) + begin * channels;
      Stored* out = static_cast<Stored*>(out_data) + begin * channels;
      each_chunk(channels, [&](auto chunk) {
        for (int64_t row = 0; row < count; ++row) {
          RSA_UNROLL for (int v = 0; v < chunk.VECTORS; ++v) {
            const V value = V::multiply_add(chunk.load(x + row * channels, v), chunk.load(scale, v), chunk.load(shift, v));
            chunk.store(relu ? V::positive(value, value) : value, out + row * channels, v);
          }
        }
      });
    });
  }

  // The gradient above the norm, from the one above the ReLU.
  template <class C>
  static RSA_INLINE V through(const C& chunk, int v, const Stored* grad, const Stored* x, const T* scale, const T* shift,
                              bool relu) {
    const V above = chunk.load(grad, v);
    if (!relu) return above;
    return V::positive(V::multiply_add(chunk.load(x, v), chunk.load(scale, v), chunk.load(shift, v)), above);
  }

  static void backward_sums(int64_t channels, int64_t rows, const void* grad_data, const void* x_data,
                            const void* scale_data, const void* shift_data, bool relu, const void* minus_data,
                            double* sums) {
    const T *scale = static_cast<const T*>(scale_data), *shift = static_cast<const T*>(shift_data);
    const T* minus = static_cast<const T*>(minus_data);
    each_block(rows, [&](int64_t begin, int64_t count) {
      const Stored* grad = static_cast<const Stored*>(grad_data) + begin * channels;
      const Stored* x = static_cast<const Stored*>(x_data) + begin * channels;
      each_chunk(channels, [&](auto chunk) {
        sum_rows(chunk, channels, count, sums, [&](int64_t row, int v, V& first, V& second) {
          const int64_t at = row * channels;
          const V above = through(chunk, v, grad + at, x + at, scale, shift, relu);
          first = V::add(first, above);
          second = V::multiply_add(above, V::add(chunk.load(x + at, v), chunk.load(minus, v)), second);
        });
      });
    });
  }

  static void backward(int64_t channels, int64_t rows, const void* grad_data, const void* x_data, const void* scale_data,
                       const void* shift_data, bool relu, const void* of_x_data, const void* rest_data, void* out_data) {
    const T *scale = static_cast<const T*>(scale_data), *shift = static_cast<const T*>(shift_data);
    const T *of_x = static_cast<const T*>(of_x_data), *rest = static_cast<const T*>(rest_data);
    each_block(rows, [&](int64_t begin, int64_t count) {
      const Stored* grad = static_cast<const Stored*>(grad_data) + begin * channels;
      const Stored* x = static_cast<const Stored*>(x_data) + begin * channels;
      Stored* out = static_cast<Stored*>(out_data) + begin * channels;
      each_chunk(channels, [&](auto chunk) {
        for (int64_t row = 0; row < count; ++row) {
          const int64_t at = row * channels;
          RSA_UNROLL for (int v = 0; v < chunk.VECTORS; ++v) {
            const V above = through(chunk, v, grad + at, x + at, scale, shift, relu);
            const V mean = V::multiply_add(chunk.load(x + at, v), chunk.load(of_x, v), chunk.load(rest, v));
            chunk.store(V::multiply_add(above, chunk.load(scale, v), mean), out + at, v);
          }
        }
      });
    });
  }
};

}  // namespace
