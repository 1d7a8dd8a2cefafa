// The target holds for what follows it: no other header with code may come in between.
#include <cstdint>
#include <cstring>

#include "passes.h"

#if defined(RSA_X86)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "vector_avx2.h"

#include "kernels.h"

const rsa::Passes& rsa::avx2_passes(Element element) { return passes_of<Avx2Float, Avx2Double>(element); }

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif
#endif
