// For tests only: found before the compiler's header, it gives the AVX-VNNI kernel of cpp/cpu/int8_gemm.cpp its one
// instruction beyond AVX2 in plain C++ (POP_EMULATE_AVX512).
#pragma once

#include_next <immintrin.h>

#include "../emulated_vpdpbusd.h"

#define _mm256_dpbusd_avx_epi32 emulated_vpdpbusd
