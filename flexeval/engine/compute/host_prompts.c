// Attention of prompts in bfloat16: blocks of a row's tokens over runs of keys, each token from its first to its last
// one. A piece of work is one block and one KV head, with all query heads to it: its rows share the keys and values that
// are brought in order for the processor's products of pairs. Softmax is taken online, a tile of keys at a time (Dao et
// al. 2022); scores and sums are float32, weights are rounded to bfloat16 for their product with values.
//
// Shapes as in host_prompts.py. Rows are a block's tokens times M, pairs two numbers that lie side by side.

#include "host_team.h"
#include "host_tiles.h"

struct source {
    const uint16_t *keys, *values;
    int64_t key_token, key_head, value_token, value_head;  // strides, in numbers
};

struct segment {
    int64_t source, first_key, num_keys;
    int64_t first_token, num_tokens;  // of the block: those that see any of the keys
    int64_t bounds;                   // where the tokens' own bounds are
};

struct prompts {
    const uint16_t *queries;   // [T, N, H]
    uint16_t *out;             // [T, N, W]
    const struct source *sources;
    const struct segment *segments;
    const int64_t *first_segments;  // [B + 1] of a block
    const int64_t *first_tokens;    // [B + 1] of a block
    const int32_t *first_seen;      // by segment and token: the first of its keys that the token sees, ...
    const int32_t *end_seen;        // ... and the one behind the last
    const float *sinks;             // [N], or NULL
    int64_t num_blocks, num_kv_heads, heads_per_kv, key_size, value_size;
    int64_t query_token, query_head;  // strides, in numbers
    float scale, softcap;           // 0: none
};

#if defined(__AVX512BF16__)
#define ROWS (96 << HAS_TILE_CODE)  // of a block at most, a multiple of GROUP and of EDGE: the more, the faster products
                                    // are beside bringing keys and values in order
#define GROUP 6   // rows whose sums are in registers
#define TILE 64   // keys
#define MOST 256  // numbers of a head
#define LOG2_E 1.44269504f

struct tile {
    int H, W;
    int is_tiled;  // whether the processor's matrix unit multiplies
    int32_t queries[ROWS * MOST / 2], keys[MOST / 2][TILE], values[TILE / 2 * MOST], weights[ROWS][TILE / 2];  // pairs
    float scores[ROWS][TILE], out[ROWS * MOST];
    float max[ROWS];     // of a row's scores times log2(e): weights are powers of 2
    floats sums[ROWS];   // of its weights, lane by lane
    float shrink[ROWS];  // factor on what was summed up before, for a larger maximum
    int is_seen[ROWS];   // whether a row sees any of the keys
};

// Keys by pair, and beside each other; none is 0.
static void order_keys(struct tile *t, const uint16_t *keys, int64_t stride, int count) {
    __m512i x[16];
    for (int key = 0; key < count; key += 16)
        for (int pair = 0; pair < t->H / 2; pair += 16) {
            const int num_pairs = t->H / 2 - pair < 16 ? t->H / 2 - pair : 16;
            const __mmask16 mask = (1u << num_pairs) - 1;
            for (int i = 0; i < 16; i++)
                x[i] = key + i < count ? _mm512_maskz_loadu_epi32(mask, keys + (key + i) * stride + 2 * pair)
                                       : _mm512_setzero_si512();
            transpose(x);
            for (int i = 0; i < num_pairs; i++) _mm512_storeu_si512(&t->keys[pair + i][key], x[i]);
        }
}

// Values of two keys side by side, for so many keys; none is 0.
static void order_values(struct tile *t, const uint16_t *values, int64_t stride, int count, int num_keys) {
    for (int key = 0; key < num_keys; key += 2)
        for (int i = 0; i < t->W; i += 16) {
            const uint16_t *const place = values + key * stride + i;
            __m512i pairs = _mm512_setzero_si512();
            if (key < count) pairs = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)place));
            if (key + 1 < count) {
                const __m256i next = _mm256_loadu_si256((const __m256i *)(place + stride));
                pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(_mm512_cvtepu16_epi32(next), 16));
            }
            _mm512_storeu_si512(&t->values[key / 2 * t->W + i], pairs);
        }
}

// sums[i][16 j ..] += the sum over k of a[i][k] times b[k][16 j ..], pair by pair.
INLINE void multiply_pairs(
    int width, int num_pairs, const int32_t *a, int64_t a_stride, const int32_t *b, int64_t b_stride, __m512 sums[GROUP][4]
) {
    for (int k = 0; k < num_pairs; k++) {
        __m512bh right[4];
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) right[j] = (__m512bh)_mm512_loadu_si512(b + k * b_stride + 16 * j);
#pragma GCC unroll 6
        for (int i = 0; i < GROUP; i++) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(a[i * a_stride + k]);
#pragma GCC unroll 4
            for (int j = 0; j < width; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
        }
    }
}

INLINE void score(struct tile *t, int width, int first, int last) {
    for (int row = first; row < last; row += GROUP) {
        __m512 sums[GROUP][4] = {{{0}}};
        multiply_pairs(width, t->H / 2, &t->queries[row * t->H / 2], t->H / 2, t->keys[0], TILE, sums);
        for (int i = 0; i < GROUP; i++)
            for (int j = 0; j < width; j++) _mm512_storeu_ps(&t->scores[row + i][16 * j], sums[i][j]);
    }
}

// Values by weight; rows that see none of them stay as they are, whatever these are.
INLINE void add_values(struct tile *t, int width, int first, int last, int column, int num_pairs) {
    for (int row = first; row < last; row += GROUP) {
        float *const out = &t->out[row * t->W + column];
        __m512 sums[GROUP][4];
        for (int i = 0; i < GROUP; i++)
            for (int j = 0; j < width; j++)
                sums[i][j] = _mm512_mul_ps(_mm512_loadu_ps(out + i * t->W + 16 * j), _mm512_set1_ps(t->shrink[row + i]));
        multiply_pairs(width, num_pairs, t->weights[row], TILE / 2, &t->values[column], t->W, sums);
        for (int i = 0; i < GROUP; i++)
            for (int j = 0; j < width && t->is_seen[row + i]; j++) _mm512_storeu_ps(out + i * t->W + 16 * j, sums[i][j]);
    }
}

// The same two by the matrix unit.
static void score_tiled(struct tile *t, int width, int first, int last) {
    for (int row = first; row < last; row += 2 * EDGE)
        for (int j = 0; j < width; j += 2)
            multiply_tiles(
                row + EDGE < last, j + 1 < width, t->H / 2, &t->queries[row * t->H / 2], t->H / 2, &t->keys[0][EDGE * j],
                TILE, &t->scores[row][EDGE * j], TILE
            );
}

static void add_values_tiled(struct tile *t, int first, int last, int num_pairs) {
    float sums[2 * EDGE][2 * EDGE];
    for (int row = first; row < last; row += 2 * EDGE)
        for (int column = 0; column < t->W; column += 2 * EDGE) {
            const int is_wide = column + EDGE < t->W, end = last - row < 2 * EDGE ? last - row : 2 * EDGE;
            multiply_tiles(
                end > EDGE, is_wide, num_pairs, t->weights[row], TILE / 2, &t->values[column], t->W, sums[0], 2 * EDGE
            );
            for (int i = 0; i < end; i++)
                for (int j = 0; j <= is_wide && t->is_seen[row + i]; j++) {
                    floats *const out = (floats *)&t->out[(row + i) * t->W + column + EDGE * j];
                    *out = *out * t->shrink[row + i] + *(floats *)&sums[i][EDGE * j];
                }
        }
}

// A copy of the code for each width: sums stay in registers.
#define FOR_WIDTH(width, call)   \
    switch (width) {             \
    case 1: call(1); break;      \
    case 2: call(2); break;      \
    case 3: call(3); break;      \
    default: call(4);            \
    }

// One row's scores become weights: those of the keys from `first` up to `end`, others 0.
INLINE void weigh(struct tile *t, const struct prompts *w, int row, int first, int end, int width) {
    t->shrink[row] = 1, t->is_seen[row] = first < end;
    if (first >= end) {
        for (int j = 0; j < width; j++) _mm256_storeu_si256((__m256i *)t->weights[row] + j, _mm256_setzero_si256());
        return;
    }
    const uint64_t is_key = ~UINT64_C(0) >> (TILE - end) & ~UINT64_C(0) << first;
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    __m512 scores[4], seen = nothing, sum = _mm512_setzero_ps();
    for (int j = 0; j < width; j++) {
        floats x = *(const floats *)&t->scores[row][16 * j];
        if (w->softcap)
            for (int i = 0; i < 16; i++) x[i] = w->softcap / w->scale * tanhf(x[i] * w->scale / w->softcap);
        scores[j] = _mm512_mask_mov_ps(nothing, is_key >> 16 * j, (__m512)(x * (w->scale * LOG2_E)));
        seen = _mm512_max_ps(seen, scores[j]);
    }
    const float max = _mm512_reduce_max_ps(seen);
    if (max > t->max[row]) {
        t->shrink[row] = exp2f(t->max[row] - max);  // 2^-inf = 0 at first
        t->max[row] = max;
    }
    for (int j = 0; j < width; j++) {
        const __m512 weights = exp2_of(_mm512_sub_ps(scores[j], _mm512_set1_ps(t->max[row])), is_key >> 16 * j);
        sum = _mm512_add_ps(sum, weights);
        _mm256_storeu_si256((__m256i *)t->weights[row] + j, (__m256i)_mm512_cvtneps_pbh(weights));
    }
    t->sums[row] = t->sums[row] * t->shrink[row] + (floats)sum;
}

static void attend_segment(struct tile *t, const struct prompts *w, const struct segment *s, int64_t head) {
    const struct source *const source = &w->sources[s->source];
    const int M = w->heads_per_kv, at_once = t->is_tiled ? EDGE : GROUP;
    const int first_row = s->first_token * M / at_once * at_once;
    const int last_row = ((s->first_token + s->num_tokens) * M + at_once - 1) / at_once * at_once;
    for (int64_t key = 0; key < s->num_keys; key += TILE) {
        const int count = s->num_keys - key < TILE ? s->num_keys - key : TILE, width = (count + 15) / 16;
        const int weighed = t->is_tiled ? (width + 1) / 2 * 2 : width;  // whole tiles of pairs
        const int64_t place = s->first_key + key;
        order_keys(t, source->keys + place * source->key_token + head * source->key_head, source->key_token, count);
#define SCORE(width) score(t, width, first_row, last_row)
        if (t->is_tiled)
            score_tiled(t, width, first_row, last_row);
        else
            FOR_WIDTH(width, SCORE)
        for (int row = first_row; row < last_row; row++) {
            const int64_t token = row / M - s->first_token, is_in = token >= 0 && token < s->num_tokens;
            const int64_t first = is_in ? w->first_seen[s->bounds + token] - key : 0;
            const int64_t end = is_in ? w->end_seen[s->bounds + token] - key : 0;
            weigh(t, w, row, first < 0 ? 0 : first, end > count ? count : end, weighed);
        }
        const uint16_t *const values = source->values + place * source->value_token + head * source->value_head;
        order_values(t, values, source->value_token, count, t->is_tiled ? 16 * weighed : count);
        if (t->is_tiled) add_values_tiled(t, first_row, last_row, 8 * weighed);
        for (int column = 0; column < t->W && !t->is_tiled; column += 64) {
            const int columns = (t->W - column < 64 ? t->W - column : 64) / 16;
#define ADD_VALUES(width) add_values(t, width, first_row, last_row, column, (count + 1) / 2)
            FOR_WIDTH(columns, ADD_VALUES)
        }
    }
}

static void attend_block(const void *work, int64_t piece) {
    const struct prompts *const w = work;
    const int64_t block = piece / w->num_kv_heads, head = piece % w->num_kv_heads, first = w->first_tokens[block];
    const int M = w->heads_per_kv, H = w->key_size, W = w->value_size;
    const int num_rows = (w->first_tokens[block + 1] - first) * M;
    struct tile t;
    t.H = H, t.W = W, t.is_tiled = H % (2 * EDGE) == 0 && has_tiles();
    const int at_once = t.is_tiled ? EDGE : GROUP, num_filled = (num_rows + at_once - 1) / at_once * at_once;
    if (t.is_tiled) begin_tiles();
    memset(&t.queries[num_rows * H / 2], 0, (num_filled - num_rows) * 2 * H);
    memset(t.out, 0, num_filled * W * sizeof *t.out);
    for (int row = 0; row < num_rows; row++) {
        const int64_t token = first + row / M, query_head = head * M + row % M;
        memcpy(&t.queries[row * H / 2], w->queries + token * w->query_token + query_head * w->query_head, 2 * H);
        t.max[row] = w->sinks ? w->sinks[query_head] * LOG2_E : -INFINITY;
        t.sums[row] = (floats){w->sinks ? 1 : 0};  // a sink adds exp(sink) to the denominator, and nothing to the sum
    }
    for (int64_t i = w->first_segments[block]; i < w->first_segments[block + 1]; i++)
        attend_segment(&t, w, &w->segments[i], head);
    if (t.is_tiled) end_tiles();
    for (int row = 0; row < num_rows; row++) {
        uint16_t *const out = w->out + (((first + row / M) * w->num_kv_heads + head) * M + row % M) * W;
        const float sum = sum_of(t.sums[row]);
        for (int i = 0; i < W; i += LANES) store(BFLOAT16, out, i, *(floats *)&t.out[row * W + i] / sum);
    }
}

// Rows of a block at most; 0 where the processor does not multiply pairs of bfloat16.
int flexeval_prompt_rows(void) { return ROWS; }

// A job for the team: all of some work, which stays until the job is waited for; NULL without memory.
struct job *flexeval_begin_prompts(struct team *team, const struct prompts *w) {
    return flexeval_begin(team, attend_block, w, w->num_blocks * w->num_kv_heads);
}
#else
int flexeval_prompt_rows(void) { return 0; }
struct job *flexeval_begin_prompts(struct team *team, const struct prompts *w) { return (void)team, (void)w, NULL; }
#endif

// Whether the processor has a matrix unit, and lets this process use it.
int flexeval_has_tiles(void) { return has_tiles(); }
