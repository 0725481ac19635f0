/* What is computed row by row between the products: embedding, norms, rope, gated activations.  Each row alone, in one order. */
#ifndef MLSYS_ROWS_H
#define MLSYS_ROWS_H

#include <stdint.h>

/* y = x / sqrt(sum of squares + n eps), times gain unless NULL: RMSNorm where gain, or the matrix that reads y, has sqrt(n) in it. */
void norm_row(float *y, const float *x, int32_t n, float eps, const float *gain);

/* x += y */
void add_row(float *x, const float *y, int32_t n);

/* Turn the pairs (i, i + dim / 2) of the first dim dimensions of each head; cos, sin: [dim / 2]. */
void rope_row(float *x, int32_t heads, int32_t head_dim, int32_t dim, const float *cos, const float *sin);

/* y = silu(gate) up, or gelu(gate) up in the form with tanh, for columns first..last-1. */
void gated_row(float *y, const float *gate, const float *up, int32_t first, int32_t last, int32_t gelu);

/* Copy row `token` of the embedding [vocab, n], fp32 or bf16, plain or as linear.h packs it for a matrix of n inputs. */
void embed_row(float *x, const void *table, int32_t format, int32_t packed, int32_t token, int32_t n, float scale);

#endif
