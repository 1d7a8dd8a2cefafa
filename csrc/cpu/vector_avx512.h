// Vectors of AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "storage.h"

namespace {

struct Avx512Float {
  using T = float;
  static constexpr int N = 16;
  static constexpr int VECTORS = 4, ROWS = 6, DOT_ROWS = 6;
  __m512 value;

  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }
  static Avx512Float of(__m512 value) { return {value}; }
  static Avx512Float zero() { return of(_mm512_setzero_ps()); }
  static Avx512Float set(float value) { return of(_mm512_set1_ps(value)); }

  static Avx512Float from(__m256i bits, BFloat16) {
    return of(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
  }
  static Avx512Float from(__m256i bits, Float16) { return of(_mm512_cvtph_ps(bits)); }
  __m256i bits(Float16) const { return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  __m256i bits(BFloat16) const {
    const __m512i raw = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(raw, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(raw, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
  }

  static Avx512Float load(const float* from) { return of(_mm512_loadu_ps(from)); }
  static Avx512Float load(const float* from, int count) { return of(_mm512_maskz_loadu_ps(first(count), from)); }
  template <class Half>
  static Avx512Float load(const Half* at) {
    return from(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), Half());
  }
  template <class Half>
  static Avx512Float load(const Half* at, int count) {
    return from(_mm256_maskz_loadu_epi16(first(count), at), Half());
  }
  void store(float* to) const { _mm512_storeu_ps(to, value); }
  void store(float* to, int count) const { _mm512_mask_storeu_ps(to, first(count), value); }
  template <class Half>
  void store(Half* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits(Half()));
  }
  template <class Half>
  void store(Half* to, int count) const {
    _mm256_mask_storeu_epi16(to, first(count), bits(Half()));
  }

  static Avx512Float add(Avx512Float a, Avx512Float b) { return of(_mm512_add_ps(a.value, b.value)); }
  static Avx512Float multiply_add(Avx512Float a, Avx512Float b, Avx512Float c) {
    return of(_mm512_fmadd_ps(a.value, b.value, c.value));
  }
  // b where a is above zero or NaN, else zero.
  static Avx512Float positive(Avx512Float a, Avx512Float b) {
    return of(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.value, _mm512_setzero_ps(), _CMP_NLE_UQ), b.value));
  }
  // The upper half of the first `left` lanes, in the place of the lower one.
  static Avx512Float upper_half(Avx512Float a, int left) {
    return of(left == 16 ? _mm512_shuffle_f32x4(a.value, a.value, 0x0e) : _mm512_shuffle_f32x4(a.value, a.value, 0x01));
  }
  static Avx512Float zip_low(Avx512Float a, Avx512Float b) {
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    return of(_mm512_permutex2var_ps(a.value, order, b.value));
  }
  static Avx512Float zip_high(Avx512Float a, Avx512Float b) {
    const __m512i order = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    return of(_mm512_permutex2var_ps(a.value, order, b.value));
  }

  // Reads 16 rows of 16 and turns them: quarters of rows are loaded where they belong, and turned four by four.
  static RSA_INLINE void turn(const float* from, int64_t row, Avx512Float (&square)[16]) {
    RSA_UNROLL for (int quarter = 0; quarter < 4; ++quarter) {
      __m512 rows[4];
      RSA_UNROLL for (int i = 0; i < 4; ++i) {
        const float* at = from + i * row + 4 * quarter;
        rows[i] = _mm512_castps128_ps512(_mm_loadu_ps(at));
        rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(at + 4 * row), 1);
        rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(at + 8 * row), 2);
        rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(at + 12 * row), 3);
      }
      const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
      const __m512d b = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
      const __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
      const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
      square[4 * quarter] = of(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)));
      square[4 * quarter + 1] = of(_mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
      square[4 * quarter + 2] = of(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)));
      square[4 * quarter + 3] = of(_mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    }
  }
};

struct Avx512Double {
  using T = double;
  static constexpr int N = 8;
  static constexpr int VECTORS = 4, ROWS = 6, DOT_ROWS = 6;
  __m512d value;

  static __mmask8 first(int count) { return static_cast<__mmask8>((1u << count) - 1); }
  static Avx512Double of(__m512d value) { return {value}; }
  static Avx512Double zero() { return of(_mm512_setzero_pd()); }
  static Avx512Double set(double value) { return of(_mm512_set1_pd(value)); }
  static Avx512Double load(const double* from) { return of(_mm512_loadu_pd(from)); }
  static Avx512Double load(const double* from, int count) { return of(_mm512_maskz_loadu_pd(first(count), from)); }
  void store(double* to) const { _mm512_storeu_pd(to, value); }
  void store(double* to, int count) const { _mm512_mask_storeu_pd(to, first(count), value); }
  static Avx512Double add(Avx512Double a, Avx512Double b) { return of(_mm512_add_pd(a.value, b.value)); }
  static Avx512Double multiply_add(Avx512Double a, Avx512Double b, Avx512Double c) {
    return of(_mm512_fmadd_pd(a.value, b.value, c.value));
  }
  // b where a is above zero or NaN, else zero.
  static Avx512Double positive(Avx512Double a, Avx512Double b) {
    return of(_mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a.value, _mm512_setzero_pd(), _CMP_NLE_UQ), b.value));
  }
  static Avx512Double upper_half(Avx512Double a, int) { return of(_mm512_shuffle_f64x2(a.value, a.value, 0x0e)); }
  static Avx512Double zip_low(Avx512Double a, Avx512Double b) {
    return of(_mm512_permutex2var_pd(a.value, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b.value));
  }
  static Avx512Double zip_high(Avx512Double a, Avx512Double b) {
    return of(_mm512_permutex2var_pd(a.value, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b.value));
  }
  static RSA_INLINE void turn(const double* from, int64_t row, Avx512Double (&square)[N]) { turn_by_zips<Avx512Double>(from, row, square); }
};

}  // namespace
