// The element types of volumes, and their conversions one by one. Everything here has internal linkage: the same text is
// compiled for several instruction sets, and a linker that folded the copies might keep one that this processor lacks.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#define RSA_UNROLL _Pragma("GCC unroll 16")
#elif defined(__clang__)
#define RSA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define RSA_UNROLL
#endif

#if defined(__GNUC__)
#define RSA_INLINE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define RSA_INLINE __forceinline
#else
#define RSA_INLINE inline
#endif

namespace {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
inline T widen(double value) {
  return static_cast<T>(value);
}
template <class T>
inline T widen(float value) {
  return static_cast<T>(value);
}
template <class T>
inline T widen(BFloat16 value) {
  return static_cast<T>(float_of(static_cast<uint32_t>(value.bits) << 16));
}
template <class T>
inline T widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Subnormal numbers are whole ones times 2^-24; the others have another bias of the exponent.
  const float magnitude = rest < 0x400 ? static_cast<float>(rest) * 5.9604644775390625e-8f
                                       : float_of((rest << 13) + 0x38000000);
  return float_of(sign | bits_of(magnitude));
}

inline void narrow(double value, double& to) { to = value; }
inline void narrow(float value, float& to) { to = value; }
inline void narrow(float value, BFloat16& to) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  to.bits = nan ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float value, Float16& to) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  uint32_t result;
  if (rest > 0x7f800000) {
    result = 0x7e00;
  } else if (rest >= 0x477ff000) {  // rounds to 65536 or more
    result = 0x7c00;
  } else if (rest < 0x38800000) {  // below 2^-14: a sum puts the unit in the last place where it belongs, and rounds
    result = bits_of(float_of(rest) + 0.5f) - 0x3f000000;
  } else {
    result = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  to.bits = static_cast<uint16_t>(sign | result);
}

// Reads N rows of N and turns them: lane j of row i becomes lane i of vector j.
template <class V>
RSA_INLINE void turn_by_zips(const typename V::T* from, int64_t row, V (&square)[V::N]) {
  RSA_UNROLL for (int i = 0; i < V::N; ++i) square[i] = V::load(from + i * row);
  RSA_UNROLL for (int rounds = 1; rounds < V::N; rounds *= 2) {
    V turned[V::N];
    RSA_UNROLL for (int i = 0; i < V::N / 2; ++i) {
      turned[2 * i] = V::zip_low(square[i], square[i + V::N / 2]);
      turned[2 * i + 1] = V::zip_high(square[i], square[i + V::N / 2]);
    }
    RSA_UNROLL for (int i = 0; i < V::N; ++i) square[i] = turned[i];
  }
}

}  // namespace
