#include "processor.h"

#include <cstring>

#if defined(RSA_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(RSA_X86) && defined(_MSC_VER) && !defined(__clang__)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace rsa {
namespace {

constexpr const char* NAMES[] = {"plain", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int SETS = 5;

// Whether there are tile registers for bfloat16, and Linux lets this process use them: who wants them has to ask.
bool has_amx() {
#if defined(RSA_AMX)
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  constexpr long ask_for_permission = 0x1023, tile_data = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (bf16 | tile)) != (bf16 | tile)) return false;
  return syscall(SYS_arch_prctl, ask_for_permission, tile_data) == 0;
#else
  return false;
#endif
}

#if defined(RSA_X86) && defined(_MSC_VER) && !defined(__clang__)
// Bits of CPUID, and of XCR0 for what the system saves of the registers.
bool has(int instruction_set) {
  int leaf1[4], leaf7[4];
  __cpuid(leaf1, 1);
  __cpuidex(leaf7, 7, 0);
  if (!(leaf1[2] & (1 << 27))) return instruction_set == 0;
  const unsigned long long saved = _xgetbv(0);
  const bool avx2 = (saved & 0x6) == 0x6 && (leaf1[2] & (1 << 12)) && (leaf1[2] & (1 << 29)) && (leaf7[1] & (1 << 5));
  const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
  const bool avx512 = avx2 && (saved & 0xe6) == 0xe6 && (static_cast<unsigned>(leaf7[1]) & wanted) == wanted;
  bool bf16 = false;
#if defined(RSA_BF16)
  if (avx512 && leaf7[0] >= 1) {
    int more[4];
    __cpuidex(more, 7, 1);
    bf16 = more[0] & (1 << 5);
  }
#endif
  if (instruction_set == 4) return bf16 && has_amx();
  const bool found[] = {true, avx2, avx512, bf16};
  return found[instruction_set];
}
#elif defined(RSA_X86)
bool has(int instruction_set) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(RSA_BF16)
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#else
  const bool bf16 = false;
#endif
  if (instruction_set == 4) return bf16 && has_amx();
  const bool found[] = {true, avx2, avx512, bf16};
  return found[instruction_set];
}
#else
bool has(int instruction_set) { return instruction_set == 0; }
#endif

// Intel's processors take as long for products of pairs as for twice as many in float, and the pairs are to be made.
bool pairs_are_slow() {
#if defined(RSA_X86) && defined(_MSC_VER) && !defined(__clang__)
  int leaf0[4];
  __cpuid(leaf0, 0);
  return leaf0[1] == 0x756e6547;  // "Genu" of GenuineIntel
#elif defined(RSA_X86)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

int best_instruction_set() {
  constexpr int PAIRS = 3;
  int best = SETS - 1;
  while (!has(best) || (best == PAIRS && pairs_are_slow())) --best;
  return best;
}

int instruction_set_of(const char* name) {
  for (int number = 0; number < SETS; ++number) {
    if (std::strcmp(name, NAMES[number]) == 0 && has(number)) return number;
  }
  return -1;
}

const char* name_of(int instruction_set) { return NAMES[instruction_set]; }

const Passes& passes_for(int instruction_set, Element element) {
#if defined(RSA_X86)
#if defined(RSA_AMX)
  if (instruction_set == 4 && element == Element::kBFloat16) return amx_passes();
#endif
#if defined(RSA_BF16)
  if (instruction_set == 3 && element == Element::kBFloat16) return avx512_bf16_passes();
#endif
  if (instruction_set >= 2) return avx512_passes(element);
  if (instruction_set == 1) return avx2_passes(element);
#endif
  return plain_passes(element);
}

}  // namespace rsa
