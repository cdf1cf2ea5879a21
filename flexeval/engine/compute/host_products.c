// Products of few tokens by a matrix in bfloat16, by a processor that adds up products of pairs (AVX-512 BF16). Both are
// read as they lie: tokens, which are few, again and again from a cache, and the matrix once from memory, of which the
// next rows are fetched while these are multiplied. A piece of work is some outputs.
//
// Shapes: T tokens, I inputs, O outputs.

#include "host_team.h"
#include "host_vectors.h"

#define TOKENS 4   // of a block of sums, which are as many as a vector has lanes
#define OUTPUTS 4  // of a block
#define PAIRED 32  // numbers of a vector
#define PIECE_OUTPUTS 32

struct product {
    const uint16_t *x, *matrix, *bias;  // [T, I], [O, I], [O] in bfloat16; NULL for no bias
    uint16_t *out;                      // [T, O]
    int64_t num_tokens, num_inputs, num_outputs, x_stride, matrix_stride;
};

#if defined(__AVX512BF16__)
int flexeval_has_products(void) { return 1; }

INLINE int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

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

// A block of sums. Meanwhile so many rows are fetched, from `ahead` on.
INLINE void multiply_block(const struct product *w, int64_t token, int64_t output, int num_ahead, int64_t ahead) {
    const uint16_t *x[TOKENS], *rows[OUTPUTS], *const next = w->matrix + ahead * w->matrix_stride;
    for (int i = 0; i < TOKENS; i++) x[i] = w->x + smaller(token + i, w->num_tokens - 1) * w->x_stride;
    for (int j = 0; j < OUTPUTS; j++) rows[j] = w->matrix + smaller(output + j, w->num_outputs - 1) * w->matrix_stride;
    __m512 sums[LANES];
    for (int i = 0; i < LANES; i++) sums[i] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + PAIRED <= w->num_inputs; k += PAIRED) {
        for (int j = 0; j < num_ahead; j++) __builtin_prefetch(next + j * w->matrix_stride + k);
        add_products(sums, x, rows, k, -1);
    }
    if (k < w->num_inputs) add_products(sums, x, rows, k, (1u << (w->num_inputs - k)) - 1);
    floats block = sums_of((floats *)sums);
    const int64_t num_outputs = smaller(OUTPUTS, w->num_outputs - output);
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
    const int64_t num_blocks = (w->num_tokens + TOKENS - 1) / TOKENS, next = output + OUTPUTS;
    int64_t block = 0;
    if (num_blocks == 1) return multiply_block(w, 0, output, 4, next);
    if (num_blocks < 4)
        for (; block < 2; block++) multiply_block(w, block * TOKENS, output, 2, next + 2 * block);
    else
        for (; block < 4; block++) multiply_block(w, block * TOKENS, output, 1, next + block);
    for (; block < num_blocks; block++) multiply_block(w, block * TOKENS, output, 0, next);
}
#else
int flexeval_has_products(void) { return 0; }
INLINE void multiply_rows(const struct product *w, int64_t output) {}
#endif

static void product_piece(const void *work, int64_t piece) {
    const struct product *const w = work;
    const int64_t first = piece * PIECE_OUTPUTS;
    for (int64_t output = first; output < first + PIECE_OUTPUTS && output < w->num_outputs; output += OUTPUTS)
        multiply_rows(w, output);
}

// All of it, which stays until the job is waited for; NULL without memory.
struct job *flexeval_begin_product(struct team *team, const struct product *w) {
    return flexeval_begin(team, product_piece, w, (w->num_outputs + PIECE_OUTPUTS - 1) / PIECE_OUTPUTS);
}
