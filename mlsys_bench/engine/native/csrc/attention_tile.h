/* Attention to one tile of keys: scores, their softmax, and the values weighted with it.
 *
 * A cache is multiplied with in one of three ways, always the same for a cache on a processor:
 *   FLOATS  fp32 products in order of dimensions and of keys
 *   PAIRS   BF16 where the processor multiplies pairs of bf16: queries and weights are rounded to bf16, sums stay fp32
 *   WHOLES  INT8: queries and weights become 16-bit fixed-point numbers, one step per row (its largest / 32,600); sums are exact
 * In the last two a word is two neighbours: dimensions of a query and a key, keys of a weight and a value.
 */
#ifndef MLSYS_ATTENTION_TILE_H
#define MLSYS_ATTENTION_TILE_H

#include "kv.h"

#define TILE 64 /* keys of a softmax of its own */
#define ROWS 64 /* queries times heads of a group that see a tile together */

enum { FLOATS, PAIRS, WHOLES };

/* A softmax over some keys: largest score, sum of exp(score - largest), and the values weighted with these, not yet divided. */
typedef struct {
    float *largest, *sum, *values; /* [rows], [rows], [rows][dp] */
} state_t;

/* Rows that see the same sequence and KV head, and the memory in which a tile is computed. */
typedef struct {
    const cache_t *c;
    const int32_t *table; /* the blocks of the sequence */
    int32_t layer, head, how, window, rows;
    float softcap;
    int32_t position[ROWS]; /* of the rows, in order */
    float *q, *k, *v, *p;   /* words: [rows][head_dim], [head_dim][TILE], [TILE][dp], [rows][TILE] */
    float *scales;          /* INT8: of the keys and of the values of the tile, [2][TILE] */
    float *q_step, *p_step; /* WHOLES: [ROWS] what 1 is worth */
} view_t;

INLINE int32_t padded(int32_t n) { return (n + LANES - 1) / LANES * LANES; }
INLINE int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
INLINE int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }

/* How a cache is multiplied with here. */
int32_t tile_how(const cache_t *c);

/* Floats of memory that views of this head_dim need, and a view's memory laid out in these. */
int64_t tile_floats(int32_t head_dim);
float *tile_room(view_t *w, int32_t head_dim, float *at);

/* Set the query of a row to q times scale. */
void tile_query(view_t *w, int32_t row, const float *q, float scale);

/* Attend to keys key0..key0+TILE-1, as far as any row sees them. */
void tile_attend(view_t *w, int32_t key0, state_t *to);

#endif
