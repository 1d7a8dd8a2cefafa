// The target holds for what follows it: no other header with code may come in between.
#include <cstdint>
#include <cstring>

#include "passes.h"

#if defined(RSA_X86)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "vector_avx512.h"

#include "kernels.h"

const rsa::Passes& rsa::avx512_passes(Element element) { return passes_of<Avx512Float, Avx512Double>(element); }

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
