// Decode attention where the KV rests: queries of single tokens over parts of contexts, read token by token as they lie.
//
// A log holds a token's heads side by side, of each the key and then the value: as numbers, or as codes in groups, whose
// scales and minima come behind the codes of all heads. A piece of work is some heads of one part: what is read of a
// token is one run, or two. Softmax is taken online, a block of tokens at a time (Milakov and
// Gimelshein 2018), all sums in float32. A team of threads takes the pieces in turn, of one job after the other without
// a gap, and sleeps while there is none: threads that spin would hold up the one that feeds the GPU.
//
// Shapes as in host_kernel.py. Sizes of heads are multiples of LANES and at most MAX_SIZE.

#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

// Vectors are as long as the processor's: longer ones, GCC takes apart number by number.
#if defined(__AVX512F__)
#define LANES 16
#define EACH_LANE(f) {f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7), f(8), f(9), f(10), f(11), f(12), f(13), f(14), f(15)}
#else
#define LANES 8
#define EACH_LANE(f) {f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)}
#endif
#define ITSELF(i) (i)
#define ITS_LOW_BITS(i) ((i) % 4)
#define BLOCK LANES  // tokens: their scores are one vector
#define MAX_SIZE 1024
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

enum kind { FLOAT32, FLOAT16, BFLOAT16, CODES8, CODES4, CODES2 };

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

INLINE floats load(enum kind kind, const uint8_t *numbers) {
    if (kind == FLOAT32) return *(const floats *)numbers;
    if (kind == BFLOAT16) return (floats)(__builtin_convertvector(*(const halves *)numbers, ints) << 16);
#if defined(__AVX512F__)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)numbers));
#else
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)numbers));
#endif
}

// Numbers of a type, rounded to the nearest, and to even ones halfway.
INLINE void store(enum kind kind, void *numbers, int64_t first, floats x) {
    if (kind == FLOAT32) {
        *(floats *)((float *)numbers + first) = x;
    } else if (kind == BFLOAT16) {
        const ints bits = (ints)x, is_number = x == x;
        const ints upper = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        *(halves *)((uint16_t *)numbers + first) = __builtin_convertvector((upper & is_number) | (0x7fc0 & ~is_number), halves);
    } else {
        uint16_t *const place = (uint16_t *)numbers + first;
#if defined(__AVX512F__)
        _mm256_storeu_si256((__m256i *)place, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#else
        _mm_storeu_si128((__m128i *)place, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#endif
    }
}

INLINE ints load_bytes(const uint8_t *bytes) {
#if defined(__AVX512F__)
    return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes));
#else
    return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bytes));
#endif
}

// exp of numbers up to 0, to 2e-7 of it (0 below exp(-87), NaN of NaN): 2^n times a polynomial, as in Cephes' expf
// (Moshier 1989).
INLINE floats exp_of(floats x) {
    const ints is_normal = ~(x <= -87.0f);
    x = (floats)((ints)x & is_normal);
    ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, ints);
    floats whole = __builtin_convertvector(n, floats);
    floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (floats)((ints)(p * (floats)((n + 127) << 23)) & is_normal);
}

// LOW: of each 2 h lanes the first h, those of x in the first half of lanes and those of y in the second; HIGH: the other
// h. Folding as many vectors as there are lanes, half of them apart, a quarter, and so on, adds up each of them into a
// lane of its own.
#define LOW_OF(h, i) ((i) / (LANES / 2) * LANES + (i) % (LANES / 2) / (h) * 2 * (h) + (i) % (h))
#define LOW8(i) LOW_OF(8, i)
#define LOW4(i) LOW_OF(4, i)
#define LOW2(i) LOW_OF(2, i)
#define LOW1(i) LOW_OF(1, i)
#define LOW(x, y, h) __builtin_shuffle(x, y, (ints)EACH_LANE(LOW##h))
#define HIGH(x, y, h) __builtin_shuffle(x, y, (ints)EACH_LANE(LOW##h) + h)
#define FOLD(h) \
    for (int i = 0; i < (h); i++) x[i] = LOW(x[2 * i], x[2 * i + 1], h) + HIGH(x[2 * i], x[2 * i + 1], h)

INLINE floats sums_of(floats x[LANES]) {
#if LANES == 16
    FOLD(8);
#endif
    FOLD(4);
    FOLD(2);
    FOLD(1);
    return x[0];
}

INLINE float sum_of(floats x) {
#if LANES == 16
    x = LOW(x, x, 8) + HIGH(x, x, 8);
#endif
    x = LOW(x, x, 4) + HIGH(x, x, 4);
    x = LOW(x, x, 2) + HIGH(x, x, 2);
    return x[0] + x[1];
}

INLINE floats larger(floats x, floats y) {
    const ints is_larger = x > y;
    return (floats)(((ints)x & is_larger) | ((ints)y & ~is_larger));
}

INLINE float max_of(floats x) {
#if LANES == 16
    x = larger(LOW(x, x, 8), HIGH(x, x, 8));
#endif
    x = larger(LOW(x, x, 4), HIGH(x, x, 4));
    x = larger(LOW(x, x, 2), HIGH(x, x, 2));
    return x[0] > x[1] ? x[0] : x[1];
}

INLINE int bits_of(enum kind kind) {
    return kind == FLOAT32 ? 32 : kind == CODES8 ? 8 : kind == CODES4 ? 4 : kind == CODES2 ? 2 : 16;
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

// One query: its output so far, and the highest score and the sum of exponentials that go with it, and a block more.
INLINE void attend_block(
    enum kind kind, const struct block *block, const struct work *w, const float *query, float *out, float *max,
    float *sum
) {
    const ints numbers = EACH_LANE(ITSELF), is_token = numbers < block->count;
    const floats nothing = (floats){0} - INFINITY;
    floats scores = multiply(kind, block, query);
    if (w->softcap)
        for (int t = 0; t < BLOCK; t++) scores[t] = w->softcap * tanhf(scores[t] / w->softcap);
    scores = (floats)(((ints)scores & is_token) | ((ints)nothing & ~is_token));
    const float seen = max_of(scores);
    if (seen > *max) {
        const float shrink = expf(*max - seen);  // exp(-inf) = 0 at first
        *max = seen;
        *sum *= shrink;
        for (int64_t i = 0; i < w->value_size; i += LANES) *(floats *)(out + i) *= shrink;
    }
    const floats weights = exp_of(scores - *max);
    *sum += sum_of(weights);
    add(kind, block, weights, out);
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
    const int64_t num_bytes = size * w->num_kv_heads * bits_of(kind) / 8;  // of a token, but for scales and minima
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
        const int64_t left = w->bounds[part + 1] - place;
        block.count = wide.count = left < BLOCK ? left : BLOCK;
        const uint8_t *tokens[BLOCK];
        for (int t = 0; t < BLOCK; t++) {
            const int64_t token = w->places[place + (t < block.count ? t : block.count - 1)];
            tokens[t] = (const uint8_t *)w->logs[part] + token * token_bytes;
        }
        // While several queries meet this block the next one comes: tokens lie too far apart for processors to foresee.
        for (int64_t t = BLOCK; M > 1 && t < (left < 2 * BLOCK ? left : 2 * BLOCK); t++) {
            const uint8_t *const next = (const uint8_t *)w->logs[part] + w->places[place + t] * token_bytes;
            const int64_t end = last_head * size * bits_of(kind) / 8;
            for (int64_t byte = first_head * size * bits_of(kind) / 8; byte < end; byte += 64) __builtin_prefetch(next + byte);
        }
        for (int64_t head = first_head; head < last_head; head++) {
            for (int t = 0; t < BLOCK; t++) block.tokens[t] = tokens[t] + head * size * bits_of(kind) / 8;
            for (int64_t group = 0; kind >= CODES8 && group < num_groups; group++) {
                ints pairs;
                for (int t = 0; t < BLOCK; t++)
                    memcpy((int32_t *)&pairs + t, tokens[t] + num_bytes + (head * num_groups + group) * 4, 4);
                const halves scales = __builtin_convertvector(pairs, halves);
                const halves minima = __builtin_convertvector(pairs >> 16, halves);
                affine[group][0] = load(FLOAT16, (const uint8_t *)&scales);
                affine[group][1] = load(FLOAT16, (const uint8_t *)&minima);
            }
            if (M > 1) widen(kind, &block, size, numbers);
            for (int64_t m = 0; m < M; m++) {
                const int64_t row = (head - first_head) * M + m;
                const float *const query = w->queries + ((w->tokens[part] * w->num_kv_heads + head) * M + m) * H;
                if (M > 1)
                    attend_block(FLOAT32, &wide, w, query, out + row * W, &max[row], &sums[row]);
                else
                    attend_block(kind, &block, w, query, out + row * W, &max[row], &sums[row]);
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

static void attend_piece(const struct work *w, int64_t piece) {
    const int64_t pieces = (w->num_kv_heads + w->heads_at_once - 1) / w->heads_at_once;  // of a part
    const int64_t part = piece / pieces, first = piece % pieces * w->heads_at_once;
    const int64_t end = first + w->heads_at_once, last = end < w->num_kv_heads ? end : w->num_kv_heads;
    switch (w->kind) {  // a copy of the code for each
    case FLOAT32: return attend(FLOAT32, w, part, first, last);
    case FLOAT16: return attend(FLOAT16, w, part, first, last);
    case BFLOAT16: return attend(BFLOAT16, w, part, first, last);
    case CODES8: return attend(CODES8, w, part, first, last);
    case CODES4: return attend(CODES4, w, part, first, last);
    case CODES2: return attend(CODES2, w, part, first, last);
    }
}

// Has so many threads, the caller's one of them, run a function: GOMP_parallel of OpenMP runtimes, since GCC 4.9.
typedef void run_parallel(void (*function)(void *), void *argument, unsigned num_threads, unsigned flags);

struct job {
    struct work work;
    atomic_llong next;      // piece
    int num_busy, is_over;  // threads that are at it; whether all is done
    double seconds;         // from its first piece, or the end of the job before, to its end
    struct job *after;
};

struct team {
    run_parallel *lent;     // NULL: the team has threads of its own
    int num_threads;
    pthread_mutex_t lock;
    pthread_cond_t begun, ended;
    pthread_t *threads;
    int num_own, num_jobs, is_dismissed;
    double ended_s;         // when a job ended last
    struct job *first, *last;  // those of which pieces are left
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

static void take_pieces(void *argument) {
    struct job *const job = argument;
    const struct work *const w = &job->work;
    const int64_t num_pieces = w->num_parts * ((w->num_kv_heads + w->heads_at_once - 1) / w->heads_at_once);
    for (int64_t piece; (piece = atomic_fetch_add(&job->next, 1)) < num_pieces;) attend_piece(w, piece);
}

static void *serve(void *argument) {
    struct team *const team = argument;
    pthread_mutex_lock(&team->lock);
    for (;;) {
        while (!team->first && !team->is_dismissed) pthread_cond_wait(&team->begun, &team->lock);
        struct job *const job = team->first;
        if (!job) break;
        if (!job->num_busy++) job->seconds = -now();  // nobody joins once a thread has found no piece left
        pthread_mutex_unlock(&team->lock);
        take_pieces(job);
        pthread_mutex_lock(&team->lock);
        if (team->first == job) team->first = job->after;
        if (--job->num_busy) continue;
        const double end = now(), begin = -job->seconds;
        job->seconds = end - (begin > team->ended_s ? begin : team->ended_s);
        job->is_over = 1, team->ended_s = end, team->num_jobs--;
        pthread_cond_broadcast(&team->ended);
    }
    pthread_mutex_unlock(&team->lock);
    return NULL;
}

// Ends a team once its jobs are done: its threads are gone.
void flexeval_dismiss(struct team *team) {
    pthread_mutex_lock(&team->lock);
    team->is_dismissed = 1;
    pthread_cond_broadcast(&team->begun);
    pthread_mutex_unlock(&team->lock);
    for (int thread = 0; thread < team->num_own; thread++) pthread_join(team->threads[thread], NULL);
    pthread_mutex_destroy(&team->lock), pthread_cond_destroy(&team->begun), pthread_cond_destroy(&team->ended);
    free(team->threads), free(team);
}

// As many threads as asked for, or as many as can be had; NULL without memory. Those that are lent come with each job,
// the caller's one of them.
struct team *flexeval_gather(int num_threads, run_parallel *lent) {
    struct team *team = calloc(1, sizeof *team);
    if (!team) return NULL;
    team->num_threads = num_threads, team->lent = lent;
    if (!(team->threads = calloc(num_threads, sizeof *team->threads))) return free(team), NULL;
    pthread_mutex_init(&team->lock, NULL), pthread_cond_init(&team->begun, NULL), pthread_cond_init(&team->ended, NULL);
    while (!lent && team->num_own < num_threads && !pthread_create(&team->threads[team->num_own], NULL, serve, team))
        team->num_own++;
    return team;
}

// A job for the team, to be waited for, behind those it has; NULL without memory. Threads that are lent have done it.
struct job *flexeval_begin(struct team *team, const struct work *work) {
    struct job *const job = calloc(1, sizeof *job);
    if (!job) return NULL;
    job->work = *work;
    if (team->lent || !team->num_own) {
        const double begin = now();
        team->lent ? team->lent(take_pieces, job, team->num_threads, 0) : take_pieces(job);
        job->seconds = now() - begin, job->is_over = 1;
        return job;
    }
    pthread_mutex_lock(&team->lock);
    if (team->first) team->last->after = job;
    else team->first = job;
    team->last = job, team->num_jobs++;
    pthread_cond_broadcast(&team->begun);
    pthread_mutex_unlock(&team->lock);
    return job;
}

// Seconds that a job took the team, once it is done. It is gone then.
double flexeval_wait(struct team *team, struct job *job) {
    pthread_mutex_lock(&team->lock);
    while (!job->is_over) pthread_cond_wait(&team->ended, &team->lock);
    pthread_mutex_unlock(&team->lock);
    const double seconds = job->seconds;
    free(job);
    return seconds;
}

// Returns when all jobs are done, waited for or not.
void flexeval_drain(struct team *team) {
    pthread_mutex_lock(&team->lock);
    while (team->num_jobs) pthread_cond_wait(&team->ended, &team->lock);
    pthread_mutex_unlock(&team->lock);
}
