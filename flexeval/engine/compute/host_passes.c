// What lies between a layer's products, in one pass over its tokens each: RMS norms, rotary positions, gates, and the
// way back from products of a matrix by tokens. Numbers are computed in float32; a piece of work is some rows.
//
// Shapes as in host_passes.py.

#include "host_team.h"
#include "host_vectors.h"

#define PIECE_NUMBERS 8192  // about, of a piece
#define BLOCKS_A_PIECE 128  // of outputs that are turned

// The i-th of some numbers.
INLINE void *at(enum kind kind, const void *numbers, int64_t i) {
    return (uint8_t *)numbers + i * bits_of(kind) / 8;
}

// A vector of them from the i-th on, or as many as there are: others are 0, and are not written.
INLINE floats load_at(enum kind kind, const void *numbers, int64_t i, int64_t size) {
    if (i + LANES <= size) return load(kind, at(kind, numbers, i));
    uint8_t last[4 * LANES] = {0};
    memcpy(last, at(kind, numbers, i), (size - i) * bits_of(kind) / 8);
    return load(kind, last);
}

INLINE void store_at(enum kind kind, void *numbers, int64_t i, int64_t size, floats x) {
    if (i + LANES <= size) return store(kind, numbers, i, x);
    uint8_t last[4 * LANES];
    store(kind, last, 0, x);
    memcpy(at(kind, numbers, i), last, (size - i) * bits_of(kind) / 8);
}

// A copy of the code for each type.
#define FOR_KIND(kind, call)              \
    switch (kind) {                       \
    case FLOAT32: call(FLOAT32); break;   \
    case FLOAT16: call(FLOAT16); break;   \
    default: call(BFLOAT16);              \
    }

// -- RMS norms --------------------------------------------------------------------------------------------------------

struct norm {
    const void *x, *weight;  // [R, D], [D]
    void *out;
    int64_t num_rows, size, stride, kind;
    float epsilon;
};

INLINE void norm_row(enum kind kind, const struct norm *w, int64_t row) {
    const void *const x = at(kind, w->x, row * w->stride);
    void *const out = at(kind, w->out, row * w->size);
    floats squares = {0};
    for (int64_t i = 0; i < w->size; i += LANES) {
        const floats part = load_at(kind, x, i, w->size);
        squares += part * part;
    }
    const float factor = 1 / sqrtf(sum_of(squares) / w->size + w->epsilon);
    for (int64_t i = 0; i < w->size; i += LANES)
        store_at(kind, out, i, w->size, load_at(kind, x, i, w->size) * factor * load_at(kind, w->weight, i, w->size));
}

// -- Gates ------------------------------------------------------------------------------------------------------------

enum activation { SILU, GELU_TANH, GELU, RELU };

struct gate {
    const void *gate, *up;  // [R, I]
    void *out;
    int64_t num_rows, size, gate_stride, up_stride, kind, activation;
};

INLINE floats sigmoid_of(floats x) {
    const ints is_below = x < 0;
    const floats e = exp_of((floats)((ints)x | INT32_MIN));  // of -|x|
    const floats one = (floats){0} + 1;
    return (floats)(((ints)e & is_below) | ((ints)one & ~is_below)) / (1 + e);
}

INLINE floats activate(enum activation activation, floats x) {
    switch (activation) {
    case SILU: return x * sigmoid_of(x);
    case GELU_TANH: return x * sigmoid_of(1.5957691216f * (x + 0.044715f * x * x * x));  // 1 + tanh(u) = 2 sigmoid(2 u)
    case RELU: return (floats)((ints)x & ~(x < 0));  // what is no number stays none
    default:
        for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1 + erff(x[i] * 0.7071067812f));
        return x;
    }
}

INLINE void gate_row(enum kind kind, const struct gate *w, int64_t row) {
    const void *const gate = at(kind, w->gate, row * w->gate_stride), *const up = at(kind, w->up, row * w->up_stride);
    void *const out = at(kind, w->out, row * w->size);
    for (int64_t i = 0; i < w->size; i += LANES) {
        uint8_t rounded[4 * LANES];  // after the activation, as torch does
        store(kind, rounded, 0, activate(w->activation, load_at(kind, gate, i, w->size)));
        store_at(kind, out, i, w->size, load(kind, rounded) * load_at(kind, up, i, w->size));
    }
}

// -- Rotary positions -------------------------------------------------------------------------------------------------

struct rotate {
    const void *x, *cos, *sin;  // [T, N, 2 half], [T, 2 half]
    void *out;                  // [T, N, 2 half]
    int64_t num_tokens, num_heads, half, token_stride, head_stride, cos_stride, sin_stride, kind;
};

INLINE void rotate_token(enum kind kind, const struct rotate *w, int64_t token) {
    const int64_t half = w->half;
    const void *const cos = at(kind, w->cos, token * w->cos_stride), *const sin = at(kind, w->sin, token * w->sin_stride);
    for (int64_t head = 0; head < w->num_heads; head++) {
        const void *const x = at(kind, w->x, token * w->token_stride + head * w->head_stride);
        void *const out = at(kind, w->out, (token * w->num_heads + head) * 2 * half);
        for (int64_t i = 0; i < half; i += LANES) {
            const floats first = load_at(kind, x, i, half), second = load_at(kind, at(kind, x, half), i, half);
            const floats first_cos = load_at(kind, cos, i, half), second_cos = load_at(kind, at(kind, cos, half), i, half);
            const floats first_sin = load_at(kind, sin, i, half), second_sin = load_at(kind, at(kind, sin, half), i, half);
            store_at(kind, out, i, half, first * first_cos - second * first_sin);
            store_at(kind, at(kind, out, half), i, half, second * second_cos + first * second_sin);
        }
    }
}

// -- Products of a matrix by tokens, token by token -------------------------------------------------------------------

struct turn {
    const uint16_t *y;  // [O, T] in bfloat16
    uint16_t *out;      // [T, O]
    int64_t num_outputs, num_tokens;
};

// A block of outputs.
static void turn_block(const struct turn *w, int64_t block) {
#if defined(__AVX512F__)  // nobody asks for it elsewhere
    const int64_t first = block * LANES;
    for (int64_t token = 0; token < w->num_tokens; token += LANES) {
        __m512i x[LANES];
        for (int64_t i = 0; i < LANES; i++)
            x[i] = first + i < w->num_outputs
                       ? (__m512i)load_at(BFLOAT16, w->y + (first + i) * w->num_tokens, token, w->num_tokens)
                       : _mm512_setzero_si512();
        transpose(x);
        for (int64_t i = 0; i < LANES && token + i < w->num_tokens; i++)
            store_at(BFLOAT16, w->out + (token + i) * w->num_outputs, first, w->num_outputs, (floats)x[i]);
    }
#endif
}

// -- Jobs: all of some work, which stays until the job is waited for; NULL without memory -----------------------------

#define PASS(name, function, num_rows, row_numbers)                                                        \
    static int64_t rows_of_##name(const struct name *w) {                                                  \
        const int64_t rows = PIECE_NUMBERS / (row_numbers);                                                \
        return rows > 0 ? rows : 1;                                                                        \
    }                                                                                                      \
    static void name##_piece(const void *work, int64_t piece) {                                            \
        const struct name *const w = work;                                                                 \
        const int64_t rows = rows_of_##name(w), first = piece * rows;                                      \
        for (int64_t row = first; row < first + rows && row < (num_rows); row++) FOR_KIND(w->kind, function) \
    }                                                                                                      \
    struct job *flexeval_begin_##name(struct team *team, const struct name *w) {                           \
        return flexeval_begin(team, name##_piece, w, ((num_rows) + rows_of_##name(w) - 1) / rows_of_##name(w)); \
    }

static void turn_piece(const void *work, int64_t piece) {
    const struct turn *const w = work;
    const int64_t num_blocks = (w->num_outputs + LANES - 1) / LANES, first = piece * BLOCKS_A_PIECE;
    for (int64_t block = first; block < first + BLOCKS_A_PIECE && block < num_blocks; block++) turn_block(w, block);
}

struct job *flexeval_begin_turn(struct team *team, const struct turn *w) {
    const int64_t num_outputs = BLOCKS_A_PIECE * LANES;
    return flexeval_begin(team, turn_piece, w, (w->num_outputs + num_outputs - 1) / num_outputs);
}

#define NORM_ROW(kind) norm_row(kind, w, row)
#define GATE_ROW(kind) gate_row(kind, w, row)
#define ROTATE_TOKEN(kind) rotate_token(kind, w, row)
PASS(norm, NORM_ROW, w->num_rows, w->size)
PASS(gate, GATE_ROW, w->num_rows, w->size)
PASS(rotate, ROTATE_TOKEN, w->num_tokens, 2 * w->half * w->num_heads)
