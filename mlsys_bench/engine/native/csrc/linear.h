/* A matrix that activations are multiplied with, as every kernel of this folder sees it.  y = x W^T (+ bias).
 *
 * Weights lie in panels of 16 output rows, so that one vector register holds the same k of 16 outputs and no sum runs across lanes:
 *   F32   float    [n/16][k][16]
 *   BF16  uint16   [n/16][k/2][16][2]      pairs of k side by side, as vdpbf16ps and AMX read them
 *   I8    int8     [n/16][k/4][16][4]      quadruples of k side by side, as vpdpbusd and AMX read them
 *   I4    uint8    [n/16][k/8][16][4]      quadruples: low nibbles are k..k+3, high nibbles k+4..k+7
 * n is padded to a multiple of 16, k to linear_padded_k() with zeros; outputs beyond n are never written.
 *
 * F32 and BF16 add in order of k, for each output the same, whatever the number of rows, threads or chunks.  Where the processor multiplies
 * pairs of bf16 (AVX512-BF16, AMX), activations of BF16 are rounded to bf16 and added in the order of that instruction, again the same.  I8 and I4 add integers,
 * exactly, also where activations stay float: a row is then written as two int8 digits of a 16-bit fixed-point number (its step, max|x| /
 * 32,600, is 1/100 of what bf16 rounds the largest element by), and the sums of the digits are put together at the end: per row (I8) or
 * per group, in order (I4).  So a token's result never depends on its neighbours in the batch.
 *
 * A product takes two steps with a barrier between them: all threads call quantise_share, then all call linear_share.
 */
#ifndef MLSYS_LINEAR_H
#define MLSYS_LINEAR_H

#include <stdint.h>

enum { F32 = 0, BF16 = 1, I8 = 2, I4 = 3 };

typedef struct {
    int32_t format;      /* of the weights: above */
    int32_t int8_input;  /* activations are quantised to int8, symmetric, one scale per row (W8A8, W4A8) */
    int32_t n, k;        /* outputs, inputs */
    int32_t group;       /* I4: inputs per scale: 32, 64 or 128; else 0 */
    const void *weight;  /* packed, 64-byte aligned */
    const void *scale;   /* I8: float [n/16][16]; I4: fp16 [n/16][k/group][16]; else NULL */
    const uint8_t *zero; /* I4: [n/16][k/group][16], or NULL where it is 8 everywhere */
    const int32_t *start;/* I8: [n/16][16] what sums begin with: -128 times the sum of the row's weights; else NULL */
    const float *bias;   /* [n] or NULL */
} linear_t;

/* Activations of m rows, and room for them in the form in which a kernel wants them. */
typedef struct {
    const float *x; /* [m, ldx] */
    int32_t ldx, m;
    void *room;     /* act_bytes(w, m) bytes, 64-byte aligned; one product at a time */
} act_t;

/* Inputs after padding. */
int32_t linear_padded_k(int32_t format, int32_t group, int32_t k);

/* Bytes of room that m rows take before w. */
int64_t act_bytes(const linear_t *w, int32_t m);

/* Fill the share of thread `ith` of `nth` of the room.  Nothing of it depends on what other threads do. */
void quantise_share(const linear_t *w, const act_t *a, int32_t ith, int32_t nth);

/* Compute the share of thread `ith` of `nth`: whole panels of 16 outputs, all m rows.  y: [m, ldy].  No allocation, no barrier inside. */
void linear_share(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t ith, int32_t nth);

/* Compute panels first..last-1 of 16 outputs, the same way: for those who choose their own. */
void linear_panels(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last);

/* Both steps on `threads` threads of the pool. */
void linear_run(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t threads);

#endif
