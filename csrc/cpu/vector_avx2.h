// Vectors of AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "storage.h"

namespace {

struct Avx2Float {
  using T = float;
  static constexpr int N = 8;
  static constexpr int VECTORS = 2, ROWS = 6, DOT_ROWS = 3;
  __m256 value;

  static Avx2Float of(__m256 value) { return {value}; }
  static Avx2Float zero() { return of(_mm256_setzero_ps()); }
  static Avx2Float set(float value) { return of(_mm256_set1_ps(value)); }

  static Avx2Float from(__m128i bits, BFloat16) {
    return of(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
  }
  static Avx2Float from(__m128i bits, Float16) { return of(_mm256_cvtph_ps(bits)); }
  __m128i bits(Float16) const { return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  __m128i bits(BFloat16) const {
    const __m256i raw = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(raw, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(raw, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }

  static Avx2Float load(const float* from) { return of(_mm256_loadu_ps(from)); }
  void store(float* to) const { _mm256_storeu_ps(to, value); }
  template <class Half>
  static Avx2Float load(const Half* at) {
    return from(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)), Half());
  }
  template <class Half>
  void store(Half* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits(Half()));
  }
  template <class Stored>
  static Avx2Float load(const Stored* from, int count) {
    Stored copy[N] = {};
    for (int i = 0; i < count; ++i) copy[i] = from[i];
    return load(copy);
  }
  template <class Stored>
  void store(Stored* to, int count) const {
    Stored copy[N];
    store(copy);
    for (int i = 0; i < count; ++i) to[i] = copy[i];
  }

  static Avx2Float add(Avx2Float a, Avx2Float b) { return of(_mm256_add_ps(a.value, b.value)); }
  static Avx2Float multiply_add(Avx2Float a, Avx2Float b, Avx2Float c) {
    return of(_mm256_fmadd_ps(a.value, b.value, c.value));
  }
  // b where a is above zero or NaN, else zero.
  static Avx2Float positive(Avx2Float a, Avx2Float b) {
    return of(_mm256_andnot_ps(_mm256_cmp_ps(a.value, _mm256_setzero_ps(), _CMP_LE_OQ), b.value));
  }
  // The upper half of the first `left` lanes, in the place of the lower one: called for 8 alone.
  static Avx2Float upper_half(Avx2Float a, int) { return of(_mm256_permute2f128_ps(a.value, a.value, 0x01)); }
  static Avx2Float zip_low(Avx2Float a, Avx2Float b) { return zip(a, b, 0x20); }
  static Avx2Float zip_high(Avx2Float a, Avx2Float b) { return zip(a, b, 0x31); }
  static Avx2Float zip(Avx2Float a, Avx2Float b, int half) {
    const __m256 low = _mm256_unpacklo_ps(a.value, b.value), high = _mm256_unpackhi_ps(a.value, b.value);
    return of(half == 0x20 ? _mm256_permute2f128_ps(low, high, 0x20) : _mm256_permute2f128_ps(low, high, 0x31));
  }
  static RSA_INLINE void turn(const float* from, int64_t row, Avx2Float (&square)[N]) { turn_by_zips<Avx2Float>(from, row, square); }
};

struct Avx2Double {
  using T = double;
  static constexpr int N = 4;
  static constexpr int VECTORS = 2, ROWS = 6, DOT_ROWS = 3;
  __m256d value;

  static Avx2Double of(__m256d value) { return {value}; }
  static Avx2Double zero() { return of(_mm256_setzero_pd()); }
  static Avx2Double set(double value) { return of(_mm256_set1_pd(value)); }
  static Avx2Double load(const double* from) { return of(_mm256_loadu_pd(from)); }
  static Avx2Double load(const double* from, int count) {
    double copy[N] = {};
    for (int i = 0; i < count; ++i) copy[i] = from[i];
    return load(copy);
  }
  void store(double* to) const { _mm256_storeu_pd(to, value); }
  void store(double* to, int count) const {
    double copy[N];
    store(copy);
    for (int i = 0; i < count; ++i) to[i] = copy[i];
  }
  static Avx2Double add(Avx2Double a, Avx2Double b) { return of(_mm256_add_pd(a.value, b.value)); }
  static Avx2Double multiply_add(Avx2Double a, Avx2Double b, Avx2Double c) {
    return of(_mm256_fmadd_pd(a.value, b.value, c.value));
  }
  // b where a is above zero or NaN, else zero.
  static Avx2Double positive(Avx2Double a, Avx2Double b) {
    return of(_mm256_andnot_pd(_mm256_cmp_pd(a.value, _mm256_setzero_pd(), _CMP_LE_OQ), b.value));
  }
  static Avx2Double upper_half(Avx2Double a, int) { return a; }  // four lanes are never halved
  static Avx2Double zip_low(Avx2Double a, Avx2Double b) {
    return of(_mm256_permute2f128_pd(_mm256_unpacklo_pd(a.value, b.value), _mm256_unpackhi_pd(a.value, b.value), 0x20));
  }
  static Avx2Double zip_high(Avx2Double a, Avx2Double b) {
    return of(_mm256_permute2f128_pd(_mm256_unpacklo_pd(a.value, b.value), _mm256_unpackhi_pd(a.value, b.value), 0x31));
  }
  static RSA_INLINE void turn(const double* from, int64_t row, Avx2Double (&square)[N]) { turn_by_zips<Avx2Double>(from, row, square); }
};

}  // namespace
