// A block of threads on a CPU: what platform.cuh asks of the machine, without a GPU.
//
// Every thread is a fiber. A barrier, and every instruction that a warp executes together, hands over to the next fiber
// until all have arrived. Asynchronous copies land as late as the program allows, when it waits for them, and shared
// memory starts as NaN, so that what is read too early shows. Matrix instructions follow PTX's tables of fragments,
// written here a second time.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

namespace rsa {
namespace emulator {

struct Copy {
  char* to;
  char data[16];
  const char* from;
  int bytes;
  bool exists;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Meeting {  // of the threads of a warp or block
  int arrived = 0;
  int64_t round = 0;
};

struct Warp {
  Meeting meeting;
  uint32_t left[32][4], right[32][2];
  float sums[32][4];
  const char* rows[32];
  uint32_t values[32];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> shared;
  Meeting meeting;
  ucontext_t scheduler;
  int64_t index = 0;
  int current = 0, living = 0;
  std::function<void()> body;
};

inline Block block;

inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

inline Fiber& fiber() { return block.fibers[block.current]; }
inline Warp& warp() { return block.warps[block.current / 32]; }
inline int lane() { return block.current % 32; }

inline void yield() { swapcontext(&fiber().context, &block.scheduler); }

// Waits for `count` threads; the last to come calls `last` first.
template <typename Last>
void meet(Meeting& meeting, int count, const Last& last) {
  const int64_t round = meeting.round;
  if (++meeting.arrived == count) {
    last();
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  while (meeting.round == round) yield();
}

inline void land(const Copy& copy) {
  if (copy.exists) {
    if (std::memcmp(copy.data, copy.from, copy.bytes) != 0) fail("a source changed under a copy");
    std::memcpy(copy.to, copy.data, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

inline void start() {
  block.body();
  fiber().done = true;
  --block.living;
  yield();
}

// Runs `blocks` blocks of `threads` threads, one after the other.
inline void launch(int64_t blocks, int threads, int shared, const std::function<void()>& body) {
  constexpr size_t stack = 1 << 17;
  block.body = body;
  for (int64_t index = 0; index < blocks; ++index) {
    block.index = index;
    block.shared.assign(shared + 16, char(0xff));
    block.warps = std::vector<Warp>(threads / 32);
    block.meeting = Meeting();
    if (static_cast<int>(block.fibers.size()) != threads) block.fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : block.fibers) {
      if (!fiber.stack) fiber.stack.reset(new char[stack]);
      fiber.done = false;
      fiber.open.clear();
      fiber.groups.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = stack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, start, 0);
    }
    block.living = threads;
    for (int64_t idle = 0; block.living > 0; ++idle) {
      if (idle > 10000000) fail("threads wait for each other");
      for (block.current = 0; block.current < threads; ++block.current) {
        if (!fiber().done) swapcontext(&block.scheduler, &fiber().context);
      }
    }
    if (block.meeting.arrived) fail("a thread left while others wait");
  }
}

}  // namespace emulator

inline int thread_index() { return emulator::block.current; }
inline int64_t block_index() { return emulator::block.index; }

inline char* shared_memory() {
  char* start = emulator::block.shared.data();
  return start + (16 - reinterpret_cast<uintptr_t>(start) % 16) % 16;
}

inline void barrier() {
  emulator::meet(emulator::block.meeting, static_cast<int>(emulator::block.fibers.size()), [] {});
}

template <int BYTES>
void copy_async(void* to, const void* from, bool exists) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "what cp.async copies");
  if (reinterpret_cast<uintptr_t>(to) % BYTES || reinterpret_cast<uintptr_t>(from) % BYTES) {
    emulator::fail("a copy is not aligned");
  }
  emulator::Copy copy{static_cast<char*>(to), {}, static_cast<const char*>(from), BYTES, exists};
  if (exists) std::memcpy(copy.data, from, BYTES);
  std::memset(to, 0xff, BYTES);
  emulator::fiber().open.push_back(copy);
}

inline void commit_copies() {
  emulator::Fiber& fiber = emulator::fiber();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

template <int PENDING>
void wait_copies() {
  auto& groups = emulator::fiber().groups;
  for (; groups.size() > PENDING; groups.pop_front()) {
    for (const emulator::Copy& copy : groups.front()) emulator::land(copy);
  }
}

namespace emulator {

inline void load_rows(uint32_t (&fragment)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("a row of a matrix is not aligned");
  Warp& here = warp();
  here.rows[lane()] = static_cast<const char*>(row);
  meet(here.meeting, 32, [] {});
  for (int matrix = 0; matrix < 4; ++matrix) {
    const char* const* rows = here.rows + matrix * 8;
    if (transposed) {
      std::memcpy(reinterpret_cast<char*>(&fragment[matrix]), rows[lane() % 4 * 2] + lane() / 4 * 2, 2);
      std::memcpy(reinterpret_cast<char*>(&fragment[matrix]) + 2, rows[lane() % 4 * 2 + 1] + lane() / 4 * 2, 2);
    } else {
      std::memcpy(&fragment[matrix], rows[lane() / 4] + lane() % 4 * 4, 4);
    }
  }
  meet(here.meeting, 32, [] {});
}

}  // namespace emulator

inline void load_matrices(uint32_t (&fragment)[4], const void* row) { emulator::load_rows(fragment, row, false); }
inline void load_matrices_transposed(uint32_t (&fragment)[4], const void* row) {
  emulator::load_rows(fragment, row, true);
}

inline void load_16_bytes(void* registers, const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("a load is not aligned");
  std::memcpy(registers, from, 16);
}
inline void store_16_bytes(void* to, const void* registers) {
  if (reinterpret_cast<uintptr_t>(to) % 16) emulator::fail("a store is not aligned");
  std::memcpy(to, registers, 16);
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float exchange(float value, int lane_mask) {
  emulator::Warp& here = emulator::warp();
  here.values[emulator::lane()] = bits_of(value);
  emulator::meet(here.meeting, 32, [] {});
  const float result = float_of(here.values[emulator::lane() ^ lane_mask]);
  emulator::meet(here.meeting, 32, [] {});
  return result;
}

inline float exponential(float value) { return std::exp(value); }
inline double exponential(double value) { return std::exp(value); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }

namespace emulator {

// sum (16 x 8) += left (16 x depth) @ right (depth x 8), depth 16 for entries of 16 bits (fragments of two), else 8.
template <typename Entry>
void multiply_fragments(float (&sum)[4], const uint32_t (&left)[4], const uint32_t* right, int depth,
                        const Entry& entry) {
  Warp& here = warp();
  std::memcpy(here.left[lane()], left, sizeof left);
  std::memcpy(here.right[lane()], right, 2 * sizeof *right);
  std::memcpy(here.sums[lane()], sum, sizeof sum);
  meet(here.meeting, 32, [&] {
    const int packed = depth / 8;  // entries in a register
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
      const int group = l / 4, member = l % 4;
      for (int e = 0; e < packed; ++e) {
        const int near = member * packed + e, far = near + depth / 2;
        a[group][near] = entry(here.left[l][0], e);
        a[group + 8][near] = entry(here.left[l][1], e);
        a[group][far] = entry(here.left[l][2], e);
        a[group + 8][far] = entry(here.left[l][3], e);
        b[near][group] = entry(here.right[l][0], e);
        b[far][group] = entry(here.right[l][1], e);
      }
    }
    for (int l = 0; l < 32; ++l) {
      for (int e = 0; e < 4; ++e) {
        const int row = l / 4 + (e < 2 ? 0 : 8), column = 2 * (l % 4) + (e & 1);
        for (int k = 0; k < depth; ++k) here.sums[l][e] += a[row][k] * b[k][column];
      }
    }
  });
  std::memcpy(sum, here.sums[lane()], sizeof sum);
}

inline float bfloat16_entry(uint32_t pair, int index) { return float_of(index ? pair & 0xffff0000u : pair << 16); }

inline float float16_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value;
  if (exponent == 31) {
    value = mantissa ? NAN : INFINITY;
  } else {
    value = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(static_cast<float>(mantissa), -24);
  }
  return bits & 0x8000 ? -value : value;
}

inline float float16_entry(uint32_t pair, int index) {
  return float16_value(static_cast<uint16_t>(index ? pair >> 16 : pair));
}

inline float tf32_entry(uint32_t bits, int) {
  if (bits & 0x1fff && !std::isnan(float_of(bits))) fail("a tf32 operand was not rounded");
  return float_of(bits);
}

inline uint16_t float16_bits(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 6.103515625e-05f) return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  std::frexp(size, &exponent);  // size = m 2^exponent, m in [1/2, 1)
  const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // in [1024, 2048]
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + mantissa - 1024);
}

inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator

inline uint32_t nearest_tf32(uint32_t bits) {
  if ((bits & 0x7f800000) == 0x7f800000) return bits & ~0x1fffu;  // infinities and NaN, whose upper bits are set here
  return (bits + 0x1000) & ~0x1fffu;
}

}  // namespace rsa
