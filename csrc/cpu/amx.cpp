// The target holds for what follows it: no other header with code may come in between. AMX itself is in assembly.
#include <cstdint>
#include <cstring>

#include "passes.h"

#if defined(RSA_AMX)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "vector_avx512.h"

#include "kernels_amx.h"

// What lies between the passes is in float, and the same as without AMX.
const rsa::Passes& rsa::amx_passes() {
  static const Passes table = [] {
    Passes passes = avx512_passes(Element::kBFloat16);
    passes.map = amx::map;
    passes.mix = amx::mix;
    passes.map_backward = amx::map_backward;
    passes.mix_backward = amx::mix_backward;
    passes.contract = amx::contract;
    passes.mix_slices = amx::mix_slices;
    passes.prepare = amx::prepare;
    passes.prepared_elements = amx::prepared_elements;
    passes.scratch_elements = amx::scratch_elements;
    passes.tile_positions = amx::tile_positions;
    return passes;
  }();
  return table;
}

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
