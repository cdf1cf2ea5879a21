// Vectors of numbers: what the kernels of the CPU have in common.

#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

// Vectors are as long as the processor's: longer ones, GCC takes apart number by number.
#if defined(__AVX512F__)
#define LANES 16
#define EACH_LANE(f) {f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)}
#else
#define LANES 8
#define EACH_LANE(f) {f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)}
#endif
#define ITSELF(i) (i)
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef uint8_t bytes_of_lanes __attribute__((vector_size(LANES), aligned(1), may_alias));

enum kind { FLOAT32, FLOAT16, BFLOAT16, CODES8, CODES4, CODES2 };

INLINE int bits_of(enum kind kind) {
    return kind == FLOAT32 ? 32 : kind == CODES8 ? 8 : kind == CODES4 ? 4 : kind == CODES2 ? 2 : 16;
}

INLINE floats load(enum kind kind, const uint8_t *numbers) {
    if (kind == FLOAT32) return *(const floats *)numbers;
    if (kind == BFLOAT16) return (floats)(__builtin_convertvector(*(const halves *)numbers, ints) << 16);
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)numbers));
#else
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)numbers));
#endif
}

// Numbers of a type, rounded to the nearest, and to even ones halfway.
INLINE void store(enum kind kind, void *numbers, int64_t first, floats x) {
    if (kind == FLOAT32) {
        *(floats *)((float *)numbers + first) = x;
    } else if (kind == BFLOAT16) {
        const ints bits = (ints)x, is_number = x == x;
        const ints upper = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, rounded = (upper & is_number) | (0x7fc0 & ~is_number);
        *(halves *)((uint16_t *)numbers + first) = __builtin_convertvector(rounded, halves);
    } else {
        uint16_t *const place = (uint16_t *)numbers + first;
#if defined(__AVX512F__)
        _mm256_storeu_si256((__m256i *)place, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
        _mm_storeu_si128((__m128i *)place, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#endif
    }
}

INLINE float from_half(uint16_t half) { return _cvtsh_ss(half); }

// What codes of a group stand for. The product and the sum are not made one operation, which would round once.
INLINE floats scaled(floats code, float scale, float minimum) {
    floats product = code * scale;
    __asm__("" : "+v"(product));
    return product + minimum;
}

// exp of numbers up to 0, to 2e-7 of it (0 below exp(-87), NaN of NaN): 2^n times a polynomial, as in Cephes' expf
// (Moshier 1989).
INLINE floats exp_of(floats x) {
    const ints is_normal = ~(x <= -87.0f);
    x = (floats)((ints)x & is_normal);
    ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    floats whole = __builtin_convertvector(n, floats);
    floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (floats)((ints)(p * (floats)((n + 127) << 23)) & is_normal);
}

// LOW: of each 2 h lanes the first h, those of x in the first half of lanes and those of y in the second; HIGH: the other
// h. Folding as many vectors as there are lanes, half of them apart, a quarter, and so on, adds up each of them into a
// lane of its own.
#define LOW_OF(h, i) ((i) / (LANES / 2) * LANES + (i) % (LANES / 2) / (h) * 2 * (h) + (i) % (h))
#define LOW8(i) LOW_OF(8, i)
#define LOW4(i) LOW_OF(4, i)
#define LOW2(i) LOW_OF(2, i)
#define LOW1(i) LOW_OF(1, i)
#define LOW(x, y, h) __builtin_shuffle(x, y, (ints)EACH_LANE(LOW##h))
#define HIGH(x, y, h) __builtin_shuffle(x, y, (ints)EACH_LANE(LOW##h) + h)
#define FOLD(h) \
    for (int i = 0; i < (h); i++) x[i] = LOW(x[2 * i], x[2 * i + 1], h) + HIGH(x[2 * i], x[2 * i + 1], h)

INLINE floats sums_of(floats x[LANES]) {
#if LANES == 16
    FOLD(8);
#endif
    FOLD(4);
    FOLD(2);
    FOLD(1);
    return x[0];
}

INLINE float sum_of(floats x) {
#if LANES == 16
    x = LOW(x, x, 8) + HIGH(x, x, 8);
#endif
    x = LOW(x, x, 4) + HIGH(x, x, 4);
    x = LOW(x, x, 2) + HIGH(x, x, 2);
    return x[0] + x[1];
}

INLINE floats larger(floats x, floats y) {
    const ints is_larger = x > y;
    return (floats)(((ints)x & is_larger) | ((ints)y & ~is_larger));
}

INLINE float max_of(floats x) {
#if LANES == 16
    x = larger(LOW(x, x, 8), HIGH(x, x, 8));
#endif
    x = larger(LOW(x, x, 4), HIGH(x, x, 4));
    x = larger(LOW(x, x, 2), HIGH(x, x, 2));
    return x[0] > x[1] ? x[0] : x[1];
}

#if defined(__AVX512F__)
// 2^x of numbers up to 0, to 2e-7 of it, as in Cephes' exp2f (Moshier 1989): at least 2^-126, for smaller ones hold the
// processor up; NaN of NaN, and 0 of what is not wanted.
INLINE __m512 exp2_of(__m512 x, __mmask16 is_wanted) {
    x = _mm512_max_ps(_mm512_set1_ps(-126), x);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT), r = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(1.535336188e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.339887440e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.618437357e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550332471e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402264791e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931472028e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1));
    return _mm512_maskz_scalef_ps(is_wanted, p, whole);
}

// x[i][j] of 16 vectors becomes x[j][i].
INLINE void transpose(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
        x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
        x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
    }
}
#endif
