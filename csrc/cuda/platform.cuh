// What the kernels ask of the machine: threads, barriers, asynchronous copies, matrix instructions.
//
// A kernel's body is a function for one thread of a block. nvcc compiles it with the PTX below. Any other C++ compiler
// takes the same names from emulator.hpp (in tests/cuda), which runs every thread of a block on a CPU; so the bodies
// that the tests execute are the ones that a GPU runs.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)

#define RSA_DEVICE __device__ __forceinline__
#define RSA_SHARED __host__ __device__ __forceinline__
#if defined(_MSC_VER) && !defined(__clang__)
#define RSA_PRAGMA(text) __pragma(text)
#else
#define RSA_PRAGMA(text) _Pragma(#text)
#endif
#define RSA_UNROLL RSA_PRAGMA(unroll)
#define RSA_UNROLL_BY(count) RSA_PRAGMA(unroll (count))

namespace rsa {

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }
__device__ __forceinline__ void barrier() { __syncthreads(); }

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies BYTES (4, 8 or 16) to shared memory in the background, zeros if not exists; `from` is read only if it does.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
  const int bytes = exists ? BYTES : 0;
  if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes),
                 "n"(BYTES)
                 : "memory");
  }
}

// Ends a group of copies of this thread; there may be none in it.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 16-byte matrices from shared memory; lanes 8m .. 8m+7 give the rows of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix of 8 x 8 16-bit entries transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// Moves 16 bytes between memory, where they are aligned, and registers, by one instruction: an assignment of a struct
// may be split into its members.
__device__ __forceinline__ void load_16_bytes(void* registers, const void* from) {
  const uint4 words = *static_cast<const uint4*>(from);
  memcpy(registers, &words, 16);
}
__device__ __forceinline__ void store_16_bytes(void* to, const void* registers) {
  uint4 words;
  memcpy(&words, registers, 16);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

__device__ __forceinline__ float exchange(float value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

__device__ __forceinline__ float exponential(float value) { return expf(value); }
__device__ __forceinline__ double exponential(double value) { return exp(value); }
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double multiply_add(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

}  // namespace rsa

#else

#define RSA_DEVICE inline
#define RSA_SHARED inline
#define RSA_UNROLL
#define RSA_UNROLL_BY(count) static_cast<void>(count);
#include "emulator.hpp"

#endif
