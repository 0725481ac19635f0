/* What the ways of computing a linear (one file each) share: the room of activations, and the function that each gives.
 *
 * Rows of the room are tokens, or the digits of tokens, top digit first.  They come in tiles of at most TILE rows, equally filled, within
 * which the rows of the same k lie side by side, so that a kernel reads a tile as one stream:
 *   F32, BF16   float  [tile][k][rows]
 *   I8          uint8  [tile][k/4][rows][4]     digit + 128
 *   I4          int8   [tile][k/4][rows][4]     and per group int32 [tile][k/group][rows]: -8 times the sum of the group
 *   BF16        bf16   [tile][k/2][rows][2]     where the processor multiplies pairs
 * For AMX they come in blocks of 16 rows, or in one of fewer, each as the tiles of that processor:
 *   BF16        bf16   [block][k/32][rows][32]
 *   I8          uint8  [block][k/64][rows][64]
 *   I4          int8   [block][k/64][rows][64]      nothing beside: zero points go with the weights there
 */
#ifndef MLSYS_LINEAR_WAYS_H
#define MLSYS_LINEAR_WAYS_H

#include <math.h>
#include <string.h>

#include "linear.h"

#if defined(FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA) /* clang tells by the latter two alone */
#define MULTIPLY_ADD(a, b, c) fmaf(a, b, c)
#else
#define MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#endif

enum {
    PANEL = 16,
    TILE = 12,
    BLOCK = 16,  /* rows of AMX's tiles at most */
    LINE = 64,   /* bytes of a row of such a tile */
    CHUNK = 128, /* inputs quantised at a time: a multiple of every group */
};

typedef struct {
    int32_t digits;       /* rows per token: 1, or 2 where integers stand for floats */
    int32_t tiles;
    int32_t k;            /* padded */
    int32_t groups;       /* I4 */
    int32_t is_blocked;   /* as AMX wants it, */
    int32_t block_rows;   /* so many rows a block: 16, or all where that is fewer */
    int32_t is_paired;    /* floats rounded to bf16, as vdpbf16ps wants them */
    float *scale;         /* [m] */
    int32_t *sums;
    uint8_t *data;
} room_t;

room_t room_of(const linear_t *w, const act_t *a);

static inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, size = half & 0x7fff;
    if (size >= 0x7c00) return from_bits(sign | 0x7f800000 | (size & 0x3ff) << 13);
    return copysignf(from_bits(size << 13) * 0x1p112f, from_bits(sign | 0x3f800000));
}

static inline int32_t first_token(int32_t m, int32_t tile, int32_t tiles) { return (int32_t)((int64_t)m * tile / tiles); }

/* A token on its way to integers. */
typedef struct {
    const float *x;
    int64_t before;          /* rows of earlier tiles */
    int32_t rows, row;       /* of the tile; the first of the token in it */
    float per_step;          /* x times this, rounded, is the integer; 0 where x is not finite, and its scale NaN */
} row_t;

/* Where line `at` of the `lines` of a row lies in AMX's layout. */
static inline uint8_t *line_of(const room_t *r, int64_t row, int32_t at, int32_t lines) {
    return r->data + ((row / BLOCK * lines + at) * r->block_rows + row % BLOCK) * LINE;
}

/* Where a row's quadruple of inputs k..k+3 lies; the next is a place further on: *step bytes. */
static inline uint8_t *quadruple(const room_t *r, const row_t *row, int32_t d, int32_t k, int64_t *step) {
    *step = r->is_blocked ? 4 : 4 * row->rows;
    if (!r->is_blocked) return r->data + row->before * r->k + (int64_t)k * row->rows + 4 * (row->row + d);
    return line_of(r, row->before + row->row + d, k / LINE, r->k / LINE) + k % LINE;
}

/* The scale of a token goes to the room here. */
row_t row_of(const linear_t *w, const act_t *a, const room_t *r, int32_t token, int32_t tile);

/* Quantise inputs first..last-1; both are multiples of CHUNK, or the end. */
void quantise_portable(const linear_t *w, const room_t *r, const row_t *row, int32_t first, int32_t last);
void quantise_avx512(const linear_t *w, const room_t *r, const row_t *row, int32_t first, int32_t last);

/* Where a row's bf16 inputs k..k+31 lie in AMX's layout. */
static inline uint8_t *line_of_pairs(const room_t *r, const row_t *row, int32_t k) {
    return line_of(r, row->before + row->row, k / 32, r->k / 32);
}

/* Round inputs first..last-1 to bf16, ties to even; the portable way knows AMX's layout alone. */
void pair_portable(const linear_t *w, const room_t *r, const row_t *row, int32_t first, int32_t last);
void pair_avx512(const linear_t *w, const room_t *r, const row_t *row, int32_t first, int32_t last);

/* Compute panels first..last-1. */
typedef void (*linear_way)(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last);

void linear_portable(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last);
void linear_avx2(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last);
void linear_avx512(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last);
void linear_amx(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last);
void linear_amx_nibbles(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last);

#endif
