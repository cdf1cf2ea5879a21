// Products of few tokens by a matrix in bfloat16, by a processor that adds up products of pairs (AVX-512 BF16). Both are
// read as they lie: tokens, which are few, again and again from a cache, and the matrix once from memory, of which the
// next rows are fetched while these are multiplied. Of 4-bit codes a few rows are unpacked at a time, into a cache. A
// piece of work is some outputs.
//
// Shapes: T tokens, I inputs, O outputs, G groups of a row of codes, P bytes of one's.

#include "host_team.h"
#include "host_vectors.h"

#define TOKENS 4   // of a block of sums, which are as many as a vector has lanes
#define OUTPUTS 4  // of a block
#define PAIRED 32  // numbers of a vector
#define PIECE_OUTPUTS 32

struct product {
    const uint16_t *x, *matrix, *bias;  // [T, I], [O, I], [O] in bfloat16; no matrix beside codes, NULL for no bias
    uint16_t *out;                      // [T, O]
    int64_t num_tokens, num_inputs, num_outputs, x_stride, matrix_stride;
    const uint8_t *codes;  // [O, G, P]; a byte holds a code of the first half of its group, and one of the second
    const uint16_t *affine;  // [O, G, 2] in float16: scales and minima
    int64_t num_groups, code_bytes;
};

INLINE int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

#if defined(__AVX512BF16__)
int flexeval_has_products(void) { return 1; }

// Adds up 32 inputs from the k-th on; those that are none are 0.
INLINE void add_products(
    __m512 sums[LANES], const uint16_t *x[TOKENS], const uint16_t *rows[OUTPUTS], int64_t k, __mmask32 is_input
) {
    __m512bh row[OUTPUTS];
    for (int j = 0; j < OUTPUTS; j++) row[j] = (__m512bh)_mm512_maskz_loadu_epi16(is_input, rows[j] + k);
    for (int i = 0; i < TOKENS; i++) {
        const __m512bh token = (__m512bh)_mm512_maskz_loadu_epi16(is_input, x[i] + k);
        for (int j = 0; j < OUTPUTS; j++) sums[OUTPUTS * i + j] = _mm512_dpbf16_ps(sums[OUTPUTS * i + j], token, row[j]);
    }
}

// A block of sums, of rows that lie `stride` apart. Meanwhile so many others are fetched, from `ahead` on.
INLINE void multiply_block(
    const struct product *w, const uint16_t *matrix, int64_t stride, int64_t token, int64_t output, int num_ahead,
    const uint16_t *ahead
) {
    const int64_t num_outputs = smaller(OUTPUTS, w->num_outputs - output);
    const uint16_t *x[TOKENS], *rows[OUTPUTS];
    for (int i = 0; i < TOKENS; i++) x[i] = w->x + smaller(token + i, w->num_tokens - 1) * w->x_stride;
    for (int j = 0; j < OUTPUTS; j++) rows[j] = matrix + smaller(j, num_outputs - 1) * stride;
    __m512 sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + PAIRED <= w->num_inputs; k += PAIRED) {
        for (int j = 0; j < num_ahead; j++) __builtin_prefetch(ahead + j * stride + k);
        add_products(sums, x, rows, k, -1);
    }
    if (k < w->num_inputs) add_products(sums, x, rows, k, (1u << (w->num_inputs - k)) - 1);
    floats block = sums_of((floats *)sums);
    uint16_t rounded[LANES] = {0};
    if (w->bias) {
        for (int i = 0; i < TOKENS; i++) memcpy(rounded + OUTPUTS * i, w->bias + output, num_outputs * sizeof *rounded);
        block += load(BFLOAT16, (const uint8_t *)rounded);
    }
    store(BFLOAT16, rounded, 0, block);
    for (int64_t i = 0; i < smaller(TOKENS, w->num_tokens - token); i++)
        memcpy(w->out + (token + i) * w->num_outputs + output, rounded + OUTPUTS * i, num_outputs * sizeof *rounded);
}

// All tokens by a few rows: the next ones are fetched a part with each block of tokens, lest memory rest meanwhile.
// (Not inlined into a loop, GCC would not unroll it, and keep its sums in memory.)
INLINE void multiply_rows(const struct product *w, int64_t output) {
    const int64_t num_blocks = (w->num_tokens + TOKENS - 1) / TOKENS, stride = w->matrix_stride;
    const uint16_t *const rows = w->matrix + output * stride, *const next = rows + OUTPUTS * stride;
    int64_t block = 0;
    if (num_blocks == 1) return multiply_block(w, rows, stride, 0, output, 4, next);
    if (num_blocks < 4)
        for (; block < 2; block++) multiply_block(w, rows, stride, block * TOKENS, output, 2, next + 2 * block * stride);
    else
        for (; block < 4; block++) multiply_block(w, rows, stride, block * TOKENS, output, 1, next + block * stride);
    for (; block < num_blocks; block++) multiply_block(w, rows, stride, block * TOKENS, output, 0, next);
}

// A group's numbers, rounded as ever: of 16 codes there are 16.
INLINE void unpack_codes(const uint8_t *codes, int64_t code_bytes, const uint16_t *affine, uint16_t *out) {
    uint16_t numbers[LANES];
    store(BFLOAT16, numbers, 0, scaled((floats)EACH_LANE(ITSELF), from_half(affine[0]), from_half(affine[1])));
    const __m512i table = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)numbers));
    for (int64_t i = 0; i < code_bytes; i += PAIRED) {
        const __mmask32 is_code = code_bytes - i < PAIRED ? (1u << (code_bytes - i)) - 1 : -1;
        const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(is_code, codes + i));
        const __m512i low = _mm512_and_si512(bytes, _mm512_set1_epi16(15)), high = _mm512_srli_epi16(bytes, 4);
        _mm512_mask_storeu_epi16(out + i, is_code, _mm512_permutexvar_epi16(low, table));
        _mm512_mask_storeu_epi16(out + code_bytes + i, is_code, _mm512_permutexvar_epi16(high, table));
    }
}

// All tokens by a few rows of codes, which are unpacked into `rows`.
INLINE void multiply_codes(const struct product *w, int64_t output, uint16_t *rows) {
    const int64_t stride = 2 * w->num_groups * w->code_bytes;
    for (int64_t row = output; row < smaller(output + OUTPUTS, w->num_outputs); row++)
        for (int64_t group = 0; group < w->num_groups; group++) {
            const int64_t index = row * w->num_groups + group;
            unpack_codes(w->codes + index * w->code_bytes, w->code_bytes, w->affine + 2 * index,
                         rows + (row - output) * stride + 2 * group * w->code_bytes);
        }
    for (int64_t token = 0; token < w->num_tokens; token += TOKENS) multiply_block(w, rows, stride, token, output, 0, rows);
}
#else
int flexeval_has_products(void) { return 0; }
INLINE void multiply_rows(const struct product *w, int64_t output) {}
INLINE void multiply_codes(const struct product *w, int64_t output, uint16_t *rows) {}
#endif

static void product_piece(const void *work, int64_t piece) {
    const struct product *const w = work;
    const int64_t first = piece * PIECE_OUTPUTS, end = smaller(first + PIECE_OUTPUTS, w->num_outputs);
    if (w->codes) {
        uint16_t rows[OUTPUTS * 2 * w->num_groups * w->code_bytes] __attribute__((aligned(64)));
        for (int64_t output = first; output < end; output += OUTPUTS) multiply_codes(w, output, rows);
    } else {
        for (int64_t output = first; output < end; output += OUTPUTS) multiply_rows(w, output);
    }
}

// All of it, which stays until the job is waited for; NULL without memory.
struct job *flexeval_begin_product(struct team *team, const struct product *w) {
    return flexeval_begin(team, product_piece, w, (w->num_outputs + PIECE_OUTPUTS - 1) / PIECE_OUTPUTS);
}
