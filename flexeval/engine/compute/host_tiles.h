// Products of pairs of bfloat16 by a processor's matrix unit (Intel AMX), where it has one and the system lets us use it.

#pragma once
#include "host_vectors.h"

#define EDGE 16  // rows and columns of a tile of sums; pairs of a tile that is multiplied

#if defined(__AMX_BF16__) && defined(__linux__)
#define HAS_TILE_CODE 1
#include <sys/syscall.h>
#include <unistd.h>

// GCC 12 does not know that tiles are loaded from memory: what was written there must not wait any longer.
#define READ(place) __asm__ volatile("" ::"r"(place) : "memory")

enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };  // as Linux has them

// Whether this process may use tiles: asked for once, by whichever thread comes first.
static int has_tiles(void) {
    static volatile int known = -1;
    if (known < 0) known = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return known;
}

// This thread's tiles are whole ones until it is done with them.
static void begin_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t num_rows[16];
    } __attribute__((aligned(64))) shape = {.palette = 1};
    for (int i = 0; i < 8; i++) shape.row_bytes[i] = 4 * EDGE, shape.num_rows[i] = EDGE;
    READ(&shape);
    _tile_loadconfig(&shape);
}

static void end_tiles(void) { _tile_release(); }

// c[i][j] = the sum over k of a[i][k] times b[k][j], pair by pair: one or two tiles of rows and of columns.
INLINE void multiply_tiles(
    int is_tall, int is_wide, int num_pairs, const int32_t *a, int64_t a_stride, const int32_t *b, int64_t b_stride, float *c,
    int64_t c_stride
) {
    READ(a);
    READ(b);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int k = 0; k < num_pairs; k += EDGE) {
        _tile_loadd(4, a + k, 4 * a_stride);
        _tile_loadd(6, b + k * b_stride, 4 * b_stride);
        _tile_dpbf16ps(0, 4, 6);
        if (is_wide) {
            _tile_loadd(7, b + k * b_stride + EDGE, 4 * b_stride);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (!is_tall) continue;
        _tile_loadd(5, a + EDGE * a_stride + k, 4 * a_stride);
        _tile_dpbf16ps(2, 5, 6);
        if (is_wide) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * c_stride);
    if (is_wide) _tile_stored(1, c + EDGE, 4 * c_stride);
    if (is_tall) _tile_stored(2, c + EDGE * c_stride, 4 * c_stride);
    if (is_tall && is_wide) _tile_stored(3, c + EDGE * c_stride + EDGE, 4 * c_stride);
}
#else
#define HAS_TILE_CODE 0
static int has_tiles(void) { return 0; }
static void begin_tiles(void) {}
static void end_tiles(void) {}
INLINE void multiply_tiles(
    int is_tall, int is_wide, int num_pairs, const int32_t *a, int64_t a_stride, const int32_t *b, int64_t b_stride, float *c,
    int64_t c_stride
) {}
#endif
