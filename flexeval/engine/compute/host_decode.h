// Decode attention by the CPU: what is to be attended to, and softmax over it; see host_decode.c, where shapes are named.

#pragma once
#include "host_vectors.h"

#define BLOCK LANES  // tokens: their scores are one vector

struct work {
    const float *queries;    // [T, K, M, H], scaled
    const int64_t *logs;     // [P] address of the log a part lies in
    const int64_t *tokens;   // [P] token of the row that asks
    const int64_t *bounds;   // [P + 1] a part's places among all
    const int32_t *places;   // tokens of the log
    float *out;              // [P, K, M, W]
    float *lse;              // [P, K, M]
    void *rounded;           // NULL, or [P, K, M, W] of `rounded_kind`: the output goes there, and `out` is scratch
    int64_t num_parts, num_kv_heads, heads_per_kv, key_size, value_size;
    int64_t heads_at_once;   // KV heads of a piece
    int64_t rounded_kind;
    int64_t kind;
    int64_t group_size;      // of codes; those of one byte's bits fill whole vectors
    float softcap;           // 0: none
};

// Where a block's tokens lie, the last one again behind the last. Returns how many there are.
INLINE int find_tokens(const struct work *w, int64_t part, int64_t place, int64_t token_bytes, const uint8_t **tokens) {
    const int64_t left = w->bounds[part + 1] - place, count = left < BLOCK ? left : BLOCK;
    for (int t = 0; t < BLOCK; t++)
        tokens[t] = (const uint8_t *)w->logs[part] + w->places[place + (t < count ? t : count - 1)] * token_bytes;
    return count;
}

// Has bytes of each of a block's tokens come to the processor while it is at others: they lie too far apart for it to
// foresee.
INLINE void fetch(const uint8_t *const *tokens, int64_t first, int64_t num_bytes) {
    for (int t = 0; t < BLOCK; t++)
        for (int64_t byte = first; byte < first + num_bytes; byte += 64) __builtin_prefetch(tokens[t] + byte);
}

// The weights of a block, relative to the highest score so far; *shrink is what earlier ones are to be multiplied by.
INLINE floats weigh(const struct work *w, floats scores, int count, float *max, float *sum, float *shrink) {
    const ints numbers = EACH_LANE(ITSELF), is_token = numbers < count;
    const floats nothing = (floats){0} - INFINITY;
    if (w->softcap)
        for (int t = 0; t < BLOCK; t++) scores[t] = w->softcap * tanhf(scores[t] / w->softcap);
    scores = (floats)(((ints)scores & is_token) | ((ints)nothing & ~is_token));
    const float seen = max_of(scores);
    *shrink = 1;
    if (seen > *max) {
        *shrink = expf(*max - seen);  // exp(-inf) = 0 at first
        *max = seen;
        *sum *= *shrink;
    }
    const floats weights = exp_of(scores - *max);
    *sum += sum_of(weights);
    return weights;
}
