// Vectors without intrinsics: what every processor has, as far as the compiler knows it.
#pragma once

#include <cstdint>
#include <cstring>

#include "storage.h"

namespace {

// Sixteen bytes: a register of SSE2 and of NEON. Loops of so few constant steps become single instructions.
template <class Scalar>
struct PlainVector {
  using T = Scalar;
  static constexpr int N = 16 / sizeof(T);
  static constexpr int VECTORS = 2, ROWS = 4, DOT_ROWS = 2;
  T lanes[N];

  static PlainVector zero() { return set(0); }
  static PlainVector set(T value) {
    PlainVector result;
    for (int i = 0; i < N; ++i) result.lanes[i] = value;
    return result;
  }
  template <class Stored>
  static PlainVector load(const Stored* from) {
    PlainVector result;
    for (int i = 0; i < N; ++i) result.lanes[i] = widen<T>(from[i]);
    return result;
  }
  template <class Stored>
  static PlainVector load(const Stored* from, int count) {
    PlainVector result = zero();
    for (int i = 0; i < count; ++i) result.lanes[i] = widen<T>(from[i]);
    return result;
  }
  template <class Stored>
  void store(Stored* to) const {
    for (int i = 0; i < N; ++i) narrow(lanes[i], to[i]);
  }
  template <class Stored>
  void store(Stored* to, int count) const {
    for (int i = 0; i < count; ++i) narrow(lanes[i], to[i]);
  }
  static PlainVector add(PlainVector a, PlainVector b) {
    for (int i = 0; i < N; ++i) a.lanes[i] += b.lanes[i];
    return a;
  }
  // a * b + c
  static PlainVector multiply_add(PlainVector a, PlainVector b, PlainVector c) {
    for (int i = 0; i < N; ++i) c.lanes[i] += a.lanes[i] * b.lanes[i];
    return c;
  }
  // b where a is above zero or NaN, else zero.
  static PlainVector positive(PlainVector a, PlainVector b) {
    for (int i = 0; i < N; ++i) b.lanes[i] = a.lanes[i] <= 0 ? 0 : b.lanes[i];
    return b;
  }
  // The upper half of the first `left` lanes, in the place of the lower one.
  static PlainVector upper_half(PlainVector a, int left) {
    for (int i = 0; i < left / 2; ++i) a.lanes[i] = a.lanes[left / 2 + i];
    return a;
  }
  // a0 b0 a1 b1 ... of the lower halves, and of the upper ones.
  static PlainVector zip_low(PlainVector a, PlainVector b) {
    PlainVector result;
    for (int i = 0; i < N / 2; ++i) {
      result.lanes[2 * i] = a.lanes[i];
      result.lanes[2 * i + 1] = b.lanes[i];
    }
    return result;
  }
  static PlainVector zip_high(PlainVector a, PlainVector b) {
    PlainVector result;
    for (int i = 0; i < N / 2; ++i) {
      result.lanes[2 * i] = a.lanes[N / 2 + i];
      result.lanes[2 * i + 1] = b.lanes[N / 2 + i];
    }
    return result;
  }
  static RSA_INLINE void turn(const T* from, int64_t row, PlainVector (&square)[N]) { turn_by_zips<PlainVector>(from, row, square); }
};

}  // namespace
