// Log-sum-exp of rows of numbers in 16 bits, which is to be taken from a logit for its log-probability, and the first of
// the largest. A piece of work is a row, which is read twice, the second time from a core's own cache. Sums are float32.

#include "host_team.h"
#include "host_vectors.h"

struct rows {
    const uint16_t *numbers;
    float *lse;
    int64_t *best;
    int64_t num_rows, size, stride, kind;
};

#define APART 4  // sums at a time: one would wait for itself

INLINE floats load_from(enum kind kind, const uint16_t *numbers) {
    return load(kind, (const uint8_t *)numbers);
}

INLINE void sum_up(enum kind kind, const uint16_t *numbers, int64_t size, float *lse, int64_t *best) {
    const int64_t step = APART * LANES, in_vectors = size - size % step;
    const floats nothing = (floats){0} - INFINITY;
    uint16_t last[APART * LANES];  // the rest, filled up with what adds nothing
    for (int64_t i = 0; i < step; i += LANES) store(kind, last, i, nothing);
    memcpy(last, numbers + in_vectors, (size - in_vectors) * sizeof *numbers);
    floats max[APART], sum[APART] = {{0}};
    for (int j = 0; j < APART; j++) max[j] = nothing;
    for (int64_t i = 0; i <= in_vectors; i += step) {
        const uint16_t *const place = i < in_vectors ? numbers + i : last;
#pragma GCC unroll 4
        for (int j = 0; j < APART; j++) max[j] = larger(max[j], load_from(kind, place + j * LANES));
    }
    const float most = max_of(larger(larger(max[0], max[1]), larger(max[2], max[3])));
    *best = -1;
    for (int64_t i = 0; i <= in_vectors; i += step) {
        const uint16_t *const place = i < in_vectors ? numbers + i : last;
        floats seen = nothing;
#pragma GCC unroll 4
        for (int j = 0; j < APART; j++) {
            const floats x = load_from(kind, place + j * LANES);
            sum[j] += exp_of(x - most);
            seen = larger(seen, x);
        }
        if (*best < 0 && max_of(seen) == most)
            for (int64_t k = 0; k < step && *best < 0; k++)
                if (load_from(kind, place + k / LANES * LANES)[k % LANES] == most) *best = i + k;
    }
    *lse = most + logf(sum_of(sum[0] + sum[1] + (sum[2] + sum[3])));
    if (*best < 0 || *best >= size) *best = 0;  // all are NaN or -inf
}

static void sum_row(const void *work, int64_t row) {
    const struct rows *const w = work;
    const uint16_t *const numbers = w->numbers + row * w->stride;
    switch (w->kind) {  // a copy of the code for each
    case FLOAT16: return sum_up(FLOAT16, numbers, w->size, &w->lse[row], &w->best[row]);
    default: return sum_up(BFLOAT16, numbers, w->size, &w->lse[row], &w->best[row]);
    }
}

// A job for the team: all of some work, which stays until the job is waited for; NULL without memory.
struct job *flexeval_begin_softmax(struct team *team, const struct rows *w) {
    return flexeval_begin(team, sum_row, w, w->num_rows);
}
