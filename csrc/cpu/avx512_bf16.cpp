// The target holds for what follows it: no other header with code may come in between.
#include <cstdint>
#include <cstring>

#include "passes.h"

#if defined(RSA_BF16)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "vector_avx512.h"

#include "kernels_bf16.h"

// What lies between the passes is in float, and the same as without products of pairs.
const rsa::Passes& rsa::avx512_bf16_passes() {
  static const Passes table = [] {
    Passes passes = avx512_passes(Element::kBFloat16);
    passes.map = bf16::map;
    passes.mix = bf16::mix;
    passes.map_backward = bf16::map_backward;
    passes.mix_backward = bf16::mix_backward;
    passes.contract = bf16::contract;
    passes.mix_slices = bf16::mix_slices;
    passes.prepare = bf16::prepare;
    passes.prepared_elements = bf16::prepared_elements;
    passes.scratch_elements = bf16::scratch_elements;
    passes.tile_positions = bf16::tile_positions;
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
