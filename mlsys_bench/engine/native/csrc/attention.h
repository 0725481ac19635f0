/* Attention to the paged cache.
 *
 * The keys of a sequence are attended to in tiles of 64 positions from position 0 on, the tiles gathered in parts of 8.  Each tile is a
 * softmax of its own; tiles are merged into their part and parts into the result, always in order.  So what a query gets depends on
 * nothing but its own position, the keys and the values: not on its chunk, the batch, the blocks or the threads.
 */
#ifndef MLSYS_ATTENTION_H
#define MLSYS_ATTENTION_H

#include "kv.h"

/* What attends: T queries of S sequences. */
typedef struct {
    const float *q; /* [T, ldq] the heads of a query side by side, those of a KV head together */
    float *out;     /* [T, ldo] */
    int32_t ldq, ldo, heads;
    int32_t tokens, sequences, width;
    const int32_t *position, *first, *block_table; /* [T], [S + 1], [S, width] */
    int32_t window;                                /* a query sees so many keys, itself included; 0: all */
    float scale, softcap;                          /* of q k; softcap 0: none */
} attend_t;

/* Floats that one thread needs to attend, and that all need together to share few long sequences. */
int64_t attention_floats(int32_t head_dim);
int64_t attention_shared_floats(int32_t threads, int32_t head_dim);

/* Whether attend() will be shared by parts of contexts, and so wants a barrier and attend_merge() after it. */
int attention_is_split(const attend_t *a, const cache_t *c, int32_t threads);

/* Whether a lone token has one task for each KV head, if it is not split: then attend_head() may take the place of attend(). */
int attention_is_by_head(const attend_t *a, const cache_t *c);

/* Attend with the queries of one KV head. */
void attend_head(const attend_t *a, const cache_t *c, int32_t layer, int32_t head, float *own);

/* Do as much as is left of the work that `next`, 0 before the first thread comes, counts; own: attention_floats, shared: of all threads. */
void attend(const attend_t *a, const cache_t *c, int32_t layer, int split, int32_t *next, float *own, float *shared);

/* Merge what parts gave, the share of thread `ith` of `nth`. */
void attend_merge(const attend_t *a, const cache_t *c, float *shared, int32_t ith, int32_t nth);

#endif
