// The types of volumes, and products of their tensor-core fragments.
#pragma once

#include "platform.cuh"

namespace rsa {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// float32 in memory, of which a product uses the leading 10 bits of the mantissa.
struct tf32 {
  float value;
};

// The type of sums, maps and softmax for volumes of type T, and whether their products run on tensor cores.
template <typename T>
struct Numbers {
  using Sum = float;
  static constexpr bool tensor_cores = true;
};
template <>
struct Numbers<float> {
  using Sum = float;
  static constexpr bool tensor_cores = false;
};
template <>
struct Numbers<double> {
  using Sum = double;
  static constexpr bool tensor_cores = false;
};

RSA_DEVICE float widen(bfloat16 number) { return float_of(static_cast<uint32_t>(number.bits) << 16); }
RSA_DEVICE float widen(tf32 number) { return number.value; }
RSA_DEVICE float widen(float number) { return number; }
RSA_DEVICE double widen(double number) { return number; }

#if defined(__CUDACC__)

RSA_DEVICE float widen(float16 number) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(number.bits));
  return result;
}

RSA_DEVICE void round_to(bfloat16& number, float value) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(number.bits) : "f"(value));
}

RSA_DEVICE void round_to(float16& number, float value) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(number.bits) : "f"(value));
}

// To the nearest tf32; the instruction would cut the bits off.
RSA_DEVICE uint32_t nearest_tf32(uint32_t bits) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(__uint_as_float(bits)));
  return result;
}

// sum (16 x 8) += left (16 x 32 bytes) @ right (32 bytes x 8); the fragments as PTX documents them.
#define RSA_MMA(SHAPE, TYPE)                                                                                   \
  asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE ".f32 "                                 \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                               \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                        \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]))

RSA_DEVICE void multiply_fragments(float (&sum)[4], const uint32_t (&left)[4], const uint32_t* right, bfloat16) {
  RSA_MMA("m16n8k16", "bf16");
}
RSA_DEVICE void multiply_fragments(float (&sum)[4], const uint32_t (&left)[4], const uint32_t* right, float16) {
  RSA_MMA("m16n8k16", "f16");
}
RSA_DEVICE void multiply_fragments(float (&sum)[4], const uint32_t (&left)[4], const uint32_t* right, tf32) {
  RSA_MMA("m16n8k8", "tf32");
}

#undef RSA_MMA

#else

RSA_DEVICE float widen(float16 number) { return emulator::float16_value(number.bits); }
RSA_DEVICE void round_to(bfloat16& number, float value) { number.bits = emulator::bfloat16_bits(value); }
RSA_DEVICE void round_to(float16& number, float value) { number.bits = emulator::float16_bits(value); }

RSA_DEVICE void multiply_fragments(float (&sum)[4], const uint32_t (&left)[4], const uint32_t* right, bfloat16) {
  emulator::multiply_fragments(sum, left, right, 16, emulator::bfloat16_entry);
}
RSA_DEVICE void multiply_fragments(float (&sum)[4], const uint32_t (&left)[4], const uint32_t* right, float16) {
  emulator::multiply_fragments(sum, left, right, 16, emulator::float16_entry);
}
RSA_DEVICE void multiply_fragments(float (&sum)[4], const uint32_t (&left)[4], const uint32_t* right, tf32) {
  emulator::multiply_fragments(sum, left, right, 8, emulator::tf32_entry);
}

#endif

RSA_DEVICE void round_to(tf32& number, float value) { number.value = value; }
RSA_DEVICE void round_to(float& number, float value) { number = value; }
RSA_DEVICE void round_to(double& number, double value) { number = value; }

template <typename T>
RSA_DEVICE T rounded(typename Numbers<T>::Sum value) {
  T number;
  round_to(number, value);
  return number;
}

}  // namespace rsa
