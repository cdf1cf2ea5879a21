// Numbers from group-wise integers: minimum + scale * code, each operation rounded to float32 as torch does them, then to
// the type that is asked for. A byte holds 8 / bits codes, the lowest ones of the first part of a group. A piece of work
// is some groups of a run; scales and minima are pairs of float16.

#include "host_team.h"
#include "host_vectors.h"

struct unpacking {
    const uint8_t *codes;
    const uint8_t *affine;
    uint8_t *out;
    int64_t num_runs, num_groups, code_bytes, bits, kind;
    int64_t codes_run, codes_group, affine_run, affine_group, out_run;  // bytes from one to the next
};

#define GROUPS 256  // of a piece

INLINE void unpack_group(enum kind kind, int bits, const uint8_t *codes, int64_t code_bytes, float scale, float minimum,
                         void *out) {
    const int64_t in_vectors = code_bytes - code_bytes % LANES;
    const int top = (1 << bits) - 1;
    uint8_t last[LANES] = {0};
    memcpy(last, codes + in_vectors, code_bytes - in_vectors);
    for (int64_t i = 0; i < code_bytes; i += LANES) {
        const uint8_t *const place = i < in_vectors ? codes + i : last;
        const ints bytes = __builtin_convertvector(*(const bytes_of_lanes *)place, ints);
#pragma GCC unroll 4
        for (int part = 0; part < 8 / bits; part++) {
            const floats x = scaled(__builtin_convertvector(bytes >> bits * part & top, floats), scale, minimum);
            if (i < in_vectors) {
                store(kind, out, part * code_bytes + i, x);
            } else {
                const int64_t size = kind == FLOAT32 ? 4 : 2;
                floats rounded;  // room for what is stored
                store(kind, &rounded, 0, x);
                memcpy((uint8_t *)out + (part * code_bytes + i) * size, &rounded, (code_bytes - i) * size);
            }
        }
    }
}

INLINE void unpack(enum kind kind, int bits, const struct unpacking *w, int64_t run, int64_t first, int64_t stop) {
    const int64_t group_bytes = w->code_bytes * 8 / bits * (kind == FLOAT32 ? 4 : 2);
    for (int64_t group = first; group < stop; group++) {
        const uint16_t *const affine = (const uint16_t *)(w->affine + run * w->affine_run + group * w->affine_group);
        const uint8_t *const codes = w->codes + run * w->codes_run + group * w->codes_group;
        unpack_group(kind, bits, codes, w->code_bytes, from_half(affine[0]), from_half(affine[1]),
                     w->out + run * w->out_run + group * group_bytes);
    }
}

static void unpack_piece(const void *work, int64_t piece) {
    const struct unpacking *const w = work;
    const int64_t num_parts = (w->num_groups + GROUPS - 1) / GROUPS;
    const int64_t run = piece / num_parts, first = piece % num_parts * GROUPS;
    const int64_t stop = first + GROUPS < w->num_groups ? first + GROUPS : w->num_groups;
    switch (w->kind * 16 + w->bits) {  // a copy of the code for each
#define CASE(kind, bits) \
    case kind * 16 + bits: return unpack(kind, bits, w, run, first, stop);
#define CASES(kind) CASE(kind, 2) CASE(kind, 4) CASE(kind, 8)
        CASES(FLOAT32) CASES(FLOAT16) CASES(BFLOAT16)
    }
}

// A job for the team: all of some work, which stays until the job is waited for; NULL without memory.
struct job *flexeval_begin_unpacking(struct team *team, const struct unpacking *w) {
    const int64_t num_parts = (w->num_groups + GROUPS - 1) / GROUPS;
    return flexeval_begin(team, unpack_piece, w, w->num_runs * num_parts);
}
