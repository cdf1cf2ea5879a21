// Decode attention of one query to a KV head over codes of up to 4 bits. A piece of work is read a block of tokens at a
// time, some heads of it at once; softmax is taken online, as in host_decode.c.

#include "host_codes.h"

#if HAS_BYTE_PRODUCTS
#include "host_bytes.h"

#define AT_ONCE 4  // heads: what one waits for the others fill

// A head's query, and its answer so far.
struct state {
    __m512i *digits;     // of the query, as `take_digits` gives them
    float *query_sums;   // over each lane, in steps
    float step, max, sum;
    floats *sums;        // of codes by weight, [chunk][r][part]
    floats *minima;      // by weight, of each group and token of a block
};

// How a token lies: the codes of all heads, then the scale and the minimum of each head's groups.
struct layout {
    struct codes keys, values;  // of a head
    int64_t head_bytes, num_groups, affine_at, token_bytes;
    const int64_t *key_groups, *value_groups;  // of lanes
};

// Scores of a block's tokens with one head's query.
INLINE floats score(
    int bits, const struct layout *l, const uint8_t *const *tokens, int64_t head, const struct state *state,
    floats (*affine)[2]
) {
    const struct codes *const keys = &l->keys;
    floats products = {0}, lanes[4];
    read_affine(tokens, l->affine_at + head * l->num_groups * 4, l->num_groups, affine);
    for (int64_t c = 0; c < keys->num_chunks; c++) {
        const __m512i *const digits = state->digits + c * (8 / bits) * DIGITS;
        const __mmask64 mask = MASK(keys->num_bytes - c * CHUNK);
        multiply_chunk(bits, tokens, head * l->head_bytes + c * CHUNK, mask, digits, lanes);
        for (int64_t lane = 4 * c; lane < 4 * c + 4; lane++) {
            const floats *const its = affine[l->key_groups[lane]];
            products += its[0] * lanes[lane % 4] + its[1] * state->query_sums[lane];
        }
    }
    return products * state->step;
}

// One head's values of a block, by weight; the scale and minimum of each of their groups are given.
INLINE void add(
    int bits, const struct layout *l, const uint8_t *const *tokens, int64_t head, struct state *state, floats weights,
    floats (*affine)[2]
) {
    const struct codes *const values = &l->values;
    __m128i digits[values->num_groups][DIGITS];
    float steps[values->num_groups];
    for (int64_t g = 0; g < values->num_groups; g++) {
        steps[g] = digits_of(weights, affine[g][0], digits[g]);
        state->minima[g] += weights * affine[g][1];
    }
    for (int64_t c = 0; c < values->num_chunks; c++) {
        const int64_t *const groups = l->value_groups + 4 * c;
        __m128i lanes[DIGITS + 1][4];
        __m512i its[DIGITS + 1];
        for (int lane = 0; lane < 4; lane++) {
            for (int digit = 0; digit < DIGITS; digit++) lanes[digit][lane] = digits[groups[lane]][digit];
            lanes[DIGITS][lane] = (__m128i)_mm_set1_ps(steps[groups[lane]]);
        }
        for (int i = 0; i <= DIGITS; i++) its[i] = lanes_of(lanes[i][0], lanes[i][1], lanes[i][2], lanes[i][3]);
        const int64_t offset = head * l->head_bytes + l->keys.num_bytes + c * CHUNK;
        const __mmask64 mask = MASK(values->num_bytes - c * CHUNK);
        add_chunk(bits, tokens, offset, mask, its, (__m512)its[DIGITS], state->sums + c * 4 * (8 / bits));
    }
}

// One head's output, in order.
INLINE void write_out(int bits, const struct codes *values, const struct state *state, float *out) {
    const int64_t num_parts = 8 / bits, part_size = values->group_bytes;
    for (int64_t g = 0; g < values->num_groups; g++) {
        const float minimum = sum_of(state->minima[g]);
        for (int64_t i = 0; i < part_size; i++) {
            const int64_t byte = g * part_size + i, vector = byte / CHUNK * 4 + byte % 16 / 4;
            for (int64_t part = 0; part < num_parts; part++) {
                const float sum = state->sums[vector * num_parts + part][byte % CHUNK / 16 * 4 + byte % 4];
                out[(g * num_parts + part) * part_size + i] = (sum + minimum) / state->sum;
            }
        }
    }
}

INLINE void attend(int bits, const struct work *w, int64_t part, int64_t first_head, int64_t num_heads) {
    const int64_t H = w->key_size, W = w->value_size, num_parts = 8 / bits;
    const struct codes keys = codes_of(bits, H, w->group_size), values = codes_of(bits, W, w->group_size);
    const int64_t head_bytes = keys.num_bytes + values.num_bytes, num_groups = keys.num_groups + values.num_groups;
    const int64_t num_digits = keys.num_chunks * num_parts * DIGITS, num_sums = values.num_chunks * 4 * num_parts;
    int64_t key_groups[4 * keys.num_chunks], value_groups[4 * values.num_chunks];
    find_groups(&keys, key_groups), find_groups(&values, value_groups);
    const struct layout l = {keys, values, head_bytes, num_groups, head_bytes * w->num_kv_heads,
                             (head_bytes + num_groups * 4) * w->num_kv_heads, key_groups, value_groups};
    struct state states[num_heads];
    __m512i digits[num_heads * num_digits];
    float query_sums[num_heads * 4 * keys.num_chunks];
    ALIGNED floats sums[num_heads * num_sums], minima[num_heads * values.num_groups];
    ALIGNED floats weights[AT_ONCE], affine[AT_ONCE][num_groups][2];
    memset(sums, 0, sizeof sums), memset(minima, 0, sizeof minima);
    for (int64_t head = 0; head < num_heads; head++) {
        struct state *const state = states + head;
        const float *const query = w->queries + (w->tokens[part] * w->num_kv_heads + first_head + head) * H;
        *state = (struct state){digits + head * num_digits, query_sums + head * 4 * keys.num_chunks, 0, -INFINITY, 0,
                                sums + head * num_sums, minima + head * values.num_groups};
        state->step = take_digits(bits, &keys, query, state->digits, state->query_sums);
    }
    for (int64_t place = w->bounds[part], end = w->bounds[part + 1]; place < end; place += BLOCK) {
        const uint8_t *tokens[BLOCK], *next[BLOCK];
        const int count = find_tokens(w, part, place, l.token_bytes, tokens);
        find_tokens(w, part, place + BLOCK < end ? place + BLOCK : place, l.token_bytes, next);
        for (int64_t first = 0; first < num_heads; first += AT_ONCE) {
            const int num = num_heads - first < AT_ONCE ? num_heads - first : AT_ONCE, is_last = first + num == num_heads;
            const int64_t here = first_head + first, then = first_head + (is_last ? 0 : first + num);
            const uint8_t *const *const from = is_last ? next : tokens;
            struct state *const its = states + first;
            for (int i = 0; i < num; i++) {
                fetch(from, (then + i) * head_bytes, keys.num_bytes);
                fetch(from, l.affine_at + (then + i) * num_groups * 4, num_groups * 4);
                weights[i] = score(bits, &l, tokens, here + i, its + i, affine[i]);
            }
            for (int i = 0; i < num; i++) {
                float shrink;
                weights[i] = weigh(w, weights[i], count, &its[i].max, &its[i].sum, &shrink);
                if (shrink == 1) continue;
                for (int64_t v = 0; v < num_sums; v++) its[i].sums[v] *= shrink;
                for (int64_t g = 0; g < values.num_groups; g++) its[i].minima[g] *= shrink;
            }
            for (int i = 0; i < num; i++) {
                fetch(from, (then + i) * head_bytes + keys.num_bytes, values.num_bytes);
                add(bits, &l, tokens, here + i, its + i, weights[i], affine[i] + keys.num_groups);
            }
        }
    }
    for (int64_t head = 0; head < num_heads; head++) {
        const int64_t row = part * w->num_kv_heads + first_head + head;
        write_out(bits, &values, states + head, w->out + row * W);
        for (int64_t i = 0; w->rounded && i < W; i += LANES)
            store(w->rounded_kind, w->rounded, row * W + i, *(const floats *)(w->out + row * W + i));
        w->lse[row] = states[head].max + logf(states[head].sum);
    }
}

void attend_to_codes(const struct work *w, int64_t part, int64_t first_head, int64_t last_head) {
    switch (w->kind) {
    case CODES4: return attend(4, w, part, first_head, last_head - first_head);
    case CODES2: return attend(2, w, part, first_head, last_head - first_head);
    }
}

#endif
