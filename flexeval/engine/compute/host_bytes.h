// Codes of up to 4 bits in the processor's products of bytes: a code is multiplied as it is, not as the number it stands
// for, since sum(q (minimum + scale code)) = minimum sum(q) + scale sum(q code).
//
// The other factor, a query or a weight, is a whole number of steps, 2^23 for the largest of them: what that loses is what
// float32 loses of the largest. Its three bytes are multiplied one after the other; of one vector all products add up in 32
// bits without an error. Sums of vectors are float32.
//
// A chunk is 64 bytes of codes: four lanes of 16, each within one group. A byte holds codes of 8 / bits parts of its
// group. Keys: the four codes of each 32 bits are one token's. Values: one code's of four tokens, a quad.

#pragma once
#include "host_decode.h"

#define DIGITS 3         // bytes of a factor
#define MOST 8388600.0f  // steps: 2^23, and room to round
#define CHUNK 64         // bytes
#define ALIGNED __attribute__((aligned(64)))
#define MASK(bytes) ((bytes) < CHUNK ? ((__mmask64)1 << (bytes)) - 1 : ~(__mmask64)0)

// Codes of one head, in order: of its key or its value.
struct codes {
    int64_t num_bytes, num_chunks, num_groups, group_bytes;
};

INLINE struct codes codes_of(int bits, int64_t size, int64_t group_size) {
    const int64_t num_bytes = size * bits / 8;
    return (struct codes){num_bytes, (num_bytes + CHUNK - 1) / CHUNK, size / group_size, group_size * bits / 8};
}

// The group of each lane; of those behind the last some group.
INLINE void find_groups(const struct codes *codes, int64_t *groups) {
    for (int64_t lane = 0; lane < 4 * codes->num_chunks; lane++)
        groups[lane] = lane * 16 < codes->num_bytes ? lane * 16 / codes->group_bytes : 0;
}

// The first digit has a query's sign.
INLINE __m128i digit_of(__m512i steps, int digit) {
    return _mm512_cvtepi32_epi8(_mm512_srai_epi32(steps, (DIGITS - 1 - digit) * 8));
}

INLINE __m512i part_of(int bits, __m512i bytes, int part) {
    return _mm512_and_si512(_mm512_srli_epi16(bytes, part * bits), _mm512_set1_epi8((1 << bits) - 1));
}

// A query's digits, [chunk][part][digit] of 64 bytes, and its sum over each lane, in steps. Returns the step.
static float take_digits(int bits, const struct codes *codes, const float *query, __m512i *digits, float *sums) {
    const int64_t part_size = codes->group_bytes, num_parts = 8 / bits;
    floats largest = {0}, all = {0};
    for (int64_t i = 0; i < codes->num_bytes * num_parts; i += LANES) {
        const floats numbers = *(const floats *)(query + i);
        largest = (floats)_mm512_max_ps((__m512)largest, _mm512_abs_ps((__m512)numbers));
        all += numbers;
    }
    const float top = max_of(largest), each = top > 0 ? MOST / top : 0;
    memset(digits, 0, codes->num_chunks * num_parts * DIGITS * sizeof *digits);
    memset(sums, 0, codes->num_chunks * 4 * sizeof *sums);
    for (int64_t group = 0; group < codes->num_groups; group++)
        for (int64_t part = 0; part < num_parts; part++)
            for (int64_t i = 0; i < part_size; i += LANES) {
                const int64_t byte = group * part_size + i;
                const floats numbers = *(const floats *)(query + (group * num_parts + part) * part_size + i);
                const __m512i steps = _mm512_cvtps_epi32((__m512)(numbers * each));
                __m512i *const its = digits + (byte / CHUNK * num_parts + part) * DIGITS;
                for (int digit = 0; digit < DIGITS; digit++)
                    _mm_storeu_si128((__m128i *)((uint8_t *)(its + digit) + byte % CHUNK), digit_of(steps, digit));
                sums[byte / 16] += sum_of((floats)_mm512_cvtepi32_ps(steps));
            }
    return top / MOST + 0 * sum_of(all);  // NaN where the query is no number
}

INLINE __m512i lanes_of(__m128i a, __m128i b, __m128i c, __m128i d) {
    const __m512i lanes = _mm512_inserti32x4(_mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1), c, 2);
    return _mm512_inserti32x4(lanes, d, 3);
}

// Scale and minimum of each group, of all tokens of a block.
INLINE void read_affine(const uint8_t *const *tokens, int64_t offset, int64_t num_groups, floats (*affine)[2]) {
    for (int64_t first = 0; first < num_groups; first += 4, offset += 16) {
        const int64_t left = num_groups - first;
        const __mmask8 mask = left < 4 ? (1 << left) - 1 : 15;
        __m512i rows[4];
        for (int j = 0; j < 4; j++) {
            __m128i lanes[4];
            for (int lane = 0; lane < 4; lane++) lanes[lane] = _mm_maskz_loadu_epi32(mask, tokens[4 * lane + j] + offset);
            rows[j] = lanes_of(lanes[0], lanes[1], lanes[2], lanes[3]);
        }
        const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpacklo_epi32(rows[2], rows[3]);
        const __m512i c = _mm512_unpackhi_epi32(rows[0], rows[1]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
        const __m512i columns[4] = {_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b),
                                    _mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d)};
        for (int64_t g = 0; g < 4 && g < left; g++) {
            const __m512i minima = _mm512_srli_epi32(columns[g], 16);
            affine[first + g][0] = (floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(columns[g]));
            affine[first + g][1] = (floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(minima));
        }
    }
}

// A chunk's codes times a query's digits, in steps, of each token: what the four lanes of 16 bytes come to.
INLINE void multiply_chunk(
    int bits, const uint8_t *const *tokens, int64_t offset, __mmask64 mask, const __m512i *digits, floats lanes[4]
) {
    __m512 quads[4];
    for (int quad = 0; quad < 4; quad++) {
        __m512 sums[4];
#pragma GCC unroll 4
        for (int t = 0; t < 4; t++) {
            const __m512i bytes = _mm512_maskz_loadu_epi8(mask, tokens[4 * quad + t] + offset);
            __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 3
            for (int digit = 0; digit < DIGITS; digit++) {
                sum = _mm512_slli_epi32(sum, 8);
#pragma GCC unroll 4
                for (int part = 0; part < 8 / bits; part++) {
                    const __m512i codes = part_of(bits, bytes, part), factors = digits[part * DIGITS + digit];
                    sum = digit ? _mm512_dpbusd_epi32(sum, factors, codes) : _mm512_dpbusd_epi32(sum, codes, factors);
                }
            }
            sums[t] = _mm512_cvtepi32_ps(sum);
        }
        const __m512 a = _mm512_unpacklo_ps(sums[0], sums[1]) + _mm512_unpackhi_ps(sums[0], sums[1]);
        const __m512 b = _mm512_unpacklo_ps(sums[2], sums[3]) + _mm512_unpackhi_ps(sums[2], sums[3]);
        const __m512d low = _mm512_unpacklo_pd((__m512d)a, (__m512d)b), high = _mm512_unpackhi_pd((__m512d)a, (__m512d)b);
        quads[quad] = (__m512)low + (__m512)high;  // in each lane, four tokens
    }
    const __m512 a = _mm512_shuffle_f32x4(quads[0], quads[1], 0x44), b = _mm512_shuffle_f32x4(quads[2], quads[3], 0x44);
    const __m512 c = _mm512_shuffle_f32x4(quads[0], quads[1], 0xee), d = _mm512_shuffle_f32x4(quads[2], quads[3], 0xee);
    lanes[0] = (floats)_mm512_shuffle_f32x4(a, b, 0x88), lanes[1] = (floats)_mm512_shuffle_f32x4(a, b, 0xdd);
    lanes[2] = (floats)_mm512_shuffle_f32x4(c, d, 0x88), lanes[3] = (floats)_mm512_shuffle_f32x4(c, d, 0xdd);
}

// A group's weights of all tokens, as digits. Returns the step.
INLINE float digits_of(floats weights, floats scale, __m128i digits[DIGITS]) {
    const float largest = _mm512_reduce_max_ps((__m512)scale);  // weights are 1 at most
    const __m512i steps = _mm512_cvtps_epi32((__m512)(weights * scale * (largest > 0 ? MOST / largest : 0)));
    for (int digit = 0; digit < DIGITS; digit++) digits[digit] = digit_of(steps, digit);
    return largest / MOST;
}

// Adds up a chunk of values by weight: [r][part] of 16 numbers, of the bytes from 4 r on of each lane.
INLINE void add_chunk(
    int bits, const uint8_t *const *tokens, int64_t offset, __mmask64 mask, const __m512i digits[DIGITS], __m512 steps,
    floats *out
) {
    __m512i codes[4][4];  // of quads, by bytes
    for (int quad = 0; quad < 4; quad++) {
        __m512i rows[4];
        for (int t = 0; t < 4; t++) rows[t] = _mm512_maskz_loadu_epi8(mask, tokens[4 * quad + t] + offset);
        const __m512i a = _mm512_unpacklo_epi8(rows[0], rows[1]), b = _mm512_unpacklo_epi8(rows[2], rows[3]);
        const __m512i c = _mm512_unpackhi_epi8(rows[0], rows[1]), d = _mm512_unpackhi_epi8(rows[2], rows[3]);
        codes[quad][0] = _mm512_unpacklo_epi16(a, b), codes[quad][1] = _mm512_unpackhi_epi16(a, b);
        codes[quad][2] = _mm512_unpacklo_epi16(c, d), codes[quad][3] = _mm512_unpackhi_epi16(c, d);
    }
    for (int r = 0; r < 4; r++)
        for (int part = 0; part < 8 / bits; part++) {
            __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 3
            for (int digit = 0; digit < DIGITS; digit++) {
                sum = _mm512_slli_epi32(sum, 8);
#define ADD(quad, each) \
    sum = _mm512_dpbusd_epi32(sum, _mm512_shuffle_epi32(digits[digit], each), part_of(bits, codes[quad][r], part))
                ADD(0, 0x00), ADD(1, 0x55), ADD(2, 0xaa), ADD(3, 0xff);
#undef ADD
            }
            out[r * (8 / bits) + part] += (floats)(_mm512_cvtepi32_ps(sum) * steps);
        }
}
