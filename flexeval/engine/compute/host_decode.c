// Decode attention where the KV rests: queries of single tokens over parts of contexts, read token by token as they lie.
//
// A log holds a token's heads side by side, of each the key and then the value: as numbers, or as codes in groups, whose
// scales and minima come behind the codes of all heads. A piece of work is some heads of one part: what is read of a
// token is one run, or two. Softmax is taken online, a block of tokens at a time (Milakov and Gimelshein 2018), all sums
// in float32.
//
// Shapes as in host_decode.py. Sizes of heads are multiples of LANES and at most MAX_SIZE.

#include "host_codes.h"
#include "host_team.h"

#define ITS_LOW_BITS(i) ((i) % 4)
#define MAX_SIZE 1024

INLINE ints load_bytes(const uint8_t *bytes) {
#if defined(__AVX512F__)
    return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
#else
    return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
#endif
}

// So many vectors are read at once.
INLINE int vectors_of(enum kind kind) {
    return kind == CODES4 ? 2 : kind == CODES2 ? 4 : 1;
}

// A block of tokens, of which one head is read: its key, and then its value, each in groups of numbers.
struct block {
    const uint8_t *tokens[BLOCK];                // where what is read begins; the last one again behind the last
    int count;
    int64_t group_size, key_groups, num_groups;  // of numbers that are no codes, a vector is a group
    const floats (*affine)[2];                   // scale and minimum of each group of codes, of all tokens
};

INLINE int64_t group_size_of(enum kind kind, const struct block *block) {
    return kind < CODES8 ? LANES : block->group_size;
}

// Numbers that are read, wherever they are: vector `v` at PLACE.
#define EACH_READ(kind, block, first, last) \
    for (int64_t size = group_size_of(kind, block), part = size / vectors_of(kind), group = first; group < last; group++) \
        for (int64_t byte = 0; byte < part; byte += LANES)
#define PLACE(first, v) ((group - (first)) * size + (v) * part + byte)

// What codes stand for, minimum + scale * code: those of few bits are looked up.
INLINE floats decode(int bits, ints codes, float scale, float minimum) {
#if defined(__AVX512F__)
    const floats fours = EACH_LANE(ITSELF), twos = EACH_LANE(ITS_LOW_BITS);
    if (bits < 8) return __builtin_shuffle(minimum + scale * (bits == 4 ? fours : twos), codes);  // by their low 4 bits
#endif
    return minimum + scale * __builtin_convertvector(codes & ((1 << bits) - 1), floats);
}

// Some of a token's group as float32. Each `bits` of a group's bytes are a part of it, and become a vector.
INLINE void read_group(enum kind kind, const struct block *block, int token, int64_t group, int64_t byte, floats *out) {
    const int bits = bits_of(kind);
    const uint8_t *const bytes = block->tokens[token] + group * group_size_of(kind, block) * bits / 8 + byte;
    if (kind < CODES8) {
        out[0] = load(kind, bytes);
        return;
    }
    const float scale = block->affine[group][0][token], minimum = block->affine[group][1][token];
    const ints packed = load_bytes(bytes);
    for (int v = 0; v < vectors_of(kind); v++) out[v] = decode(bits, packed >> v * bits, scale, minimum);
}

// A query's product with each key.
INLINE floats multiply(enum kind kind, const struct block *block, const float *query) {
    floats products[BLOCK] = {0}, read[4];
    EACH_READ(kind, block, 0, block->key_groups)
#pragma GCC unroll 16
        for (int t = 0; t < BLOCK; t++) {
            read_group(kind, block, t, group, byte, read);
            for (int v = 0; v < vectors_of(kind); v++)
                products[t] += *(const floats *)(query + PLACE(0, v)) * read[v];
        }
    return sums_of(products);
}

// Values, by weight.
INLINE void add(enum kind kind, const struct block *block, floats weights, float *out) {
    EACH_READ(kind, block, block->key_groups, block->num_groups) {
        floats sums[2][4] = {{{0}}}, read[4];
#pragma GCC unroll 16
        for (int t = 0; t < BLOCK; t++) {
            read_group(kind, block, t, group, byte, read);
            for (int v = 0; v < vectors_of(kind); v++) sums[t % 2][v] += weights[t] * read[v];
        }
        for (int v = 0; v < vectors_of(kind); v++)
            *(floats *)(out + PLACE(block->key_groups, v)) += sums[0][v] + sums[1][v];
    }
}

// The queries of one KV head: their outputs so far, and the highest scores and the sums of exponentials that go with them,
// and a block more. What one query waits for others fill.
INLINE void attend_block(
    enum kind kind, const struct block *block, const struct work *w, const float *queries, float *outs, float *max,
    float *sum
) {
    const int64_t M = w->heads_per_kv, W = w->value_size;
    floats weights[M] __attribute__((aligned(64)));
    float shrink;
    for (int64_t m = 0; m < M; m++) weights[m] = multiply(kind, block, queries + m * w->key_size);
    for (int64_t m = 0; m < M; m++) {
        weights[m] = weigh(w, weights[m], block->count, &max[m], &sum[m], &shrink);
        for (int64_t i = 0; shrink != 1 && i < W; i += LANES) *(floats *)(outs + m * W + i) *= shrink;
    }
    for (int64_t m = 0; m < M; m++) add(kind, block, weights[m], outs + m * W);
}

// All that is read of a block, as float32, for queries that read it again.
INLINE void widen(enum kind kind, const struct block *block, int64_t num_numbers, float *numbers) {
    floats read[4];
    for (int t = 0; t < BLOCK; t++)
        EACH_READ(kind, block, 0, block->num_groups) {
            read_group(kind, block, t, group, byte, read);
            for (int v = 0; v < vectors_of(kind); v++) *(floats *)(numbers + t * num_numbers + PLACE(0, v)) = read[v];
        }
}

INLINE void attend(enum kind kind, const struct work *w, int64_t part, int64_t first_head, int64_t last_head) {
    const int64_t H = w->key_size, W = w->value_size, M = w->heads_per_kv, size = H + W;
    const int64_t group_size = kind >= CODES8 ? w->group_size : LANES, num_groups = size / group_size;
    const int64_t head_bytes = size * bits_of(kind) / 8;
    const int64_t num_bytes = head_bytes * w->num_kv_heads;  // of a token, but for scales and minima
    const int64_t token_bytes = num_bytes + (kind >= CODES8 ? num_groups * w->num_kv_heads * 4 : 0);
    const int64_t first_row = (part * w->num_kv_heads + first_head) * M;
    const int64_t num_rows = (last_head - first_head) * M;
    float *const out = w->out + first_row * W, *const max = w->lse + first_row, sums[num_rows];
    float numbers[M > 1 ? BLOCK * size : 1] __attribute__((aligned(64)));
    floats affine[num_groups][2];
    struct block block = {{0}, 0, group_size, H / group_size, num_groups, affine};
    struct block wide = {{0}, 0, LANES, H / LANES, size / LANES, NULL};
    for (int t = 0; t < BLOCK; t++) wide.tokens[t] = (const uint8_t *)(numbers + t * size);
    memset(out, 0, num_rows * W * sizeof *out);
    for (int64_t row = 0; row < num_rows; row++) max[row] = -INFINITY, sums[row] = 0;
    for (int64_t place = w->bounds[part]; place < w->bounds[part + 1]; place += BLOCK) {
        const uint8_t *tokens[BLOCK], *next[BLOCK];
        block.count = wide.count = find_tokens(w, part, place, token_bytes, tokens);
        if (M > 1) find_tokens(w, part, place + BLOCK < w->bounds[part + 1] ? place + BLOCK : place, token_bytes, next);
        for (int64_t head = first_head; head < last_head; head++) {
            const int is_last = head == last_head - 1;
            if (M > 1) fetch(is_last ? next : tokens, (is_last ? first_head : head + 1) * head_bytes, head_bytes);
            for (int t = 0; t < BLOCK; t++) block.tokens[t] = tokens[t] + head * head_bytes;
            for (int64_t group = 0; kind >= CODES8 && group < num_groups; group++) {
                ints pairs;
                for (int t = 0; t < BLOCK; t++)
                    memcpy((int32_t *)&pairs + t, tokens[t] + num_bytes + (head * num_groups + group) * 4, 4);
                const halves scales = __builtin_convertvector(pairs, halves);
                const halves minima = __builtin_convertvector(pairs >> 16, halves);
                affine[group][0] = load(FLOAT16, (const uint8_t *)&scales);
                affine[group][1] = load(FLOAT16, (const uint8_t *)&minima);
            }
            const int64_t row = (head - first_head) * M;
            const float *const queries = w->queries + (w->tokens[part] * w->num_kv_heads + head) * M * H;
            if (M > 1) {
                widen(kind, &block, size, numbers);
                attend_block(FLOAT32, &wide, w, queries, out + row * W, &max[row], &sums[row]);
            } else {
                attend_block(kind, &block, w, queries, out + row * W, &max[row], &sums[row]);
            }
        }
    }
    for (int64_t row = 0; row < num_rows; row++) {
        for (int64_t i = 0; i < W; i += LANES) {
            floats *const place = (floats *)(out + row * W + i);
            *place /= sums[row];
            if (w->rounded) store(w->rounded_kind, w->rounded, (first_row + row) * W + i, *place);
        }
        max[row] += logf(sums[row]);  // is the log-sum-exp now
    }
}

static void attend_piece(const void *work, int64_t piece) {
    const struct work *const w = work;
    const int64_t pieces = (w->num_kv_heads + w->heads_at_once - 1) / w->heads_at_once;  // of a part
    const int64_t part = piece / pieces, first = piece % pieces * w->heads_at_once;
    const int64_t end = first + w->heads_at_once, last = end < w->num_kv_heads ? end : w->num_kv_heads;
#if HAS_BYTE_PRODUCTS
    if ((w->kind == CODES4 || w->kind == CODES2) && w->heads_per_kv == 1) return attend_to_codes(w, part, first, last);
#endif
    switch (w->kind) {  // a copy of the code for each
    case FLOAT32: return attend(FLOAT32, w, part, first, last);
    case FLOAT16: return attend(FLOAT16, w, part, first, last);
    case BFLOAT16: return attend(BFLOAT16, w, part, first, last);
    case CODES8: return attend(CODES8, w, part, first, last);
    case CODES4: return attend(CODES4, w, part, first, last);
    case CODES2: return attend(CODES2, w, part, first, last);
    }
}

// A job for the team: all of some work, which stays until the job is waited for; NULL without memory.
struct job *flexeval_begin_decode(struct team *team, const struct work *w) {
    const int64_t pieces = (w->num_kv_heads + w->heads_at_once - 1) / w->heads_at_once;  // of a part
    return flexeval_begin(team, attend_piece, w, w->num_parts * pieces);
}
