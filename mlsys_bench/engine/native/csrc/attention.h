/* The paged cache of keys and values, and attention to it.
 *
 * A block holds the tokens of block_tokens positions in a row, head by head: of each head first the keys, [head_dim][block_tokens], so that
 * one vector holds the same dimension of neighbouring keys and no sum of a score runs across lanes; then the values,
 * [block_tokens][head_dim]; then, INT8 only, a float scale of each key and of each value, [2][block_tokens].
 *
 * The keys of a sequence are attended to in tiles of 64 positions from position 0 on, the tiles gathered in parts of 8.  Each tile is a
 * softmax of its own; tiles are merged into their part and parts into the result, always in order.  So what a query gets depends on
 * nothing but its own position, the keys and the values: not on its chunk, the batch, the blocks or the threads.
 */
#ifndef MLSYS_ATTENTION_H
#define MLSYS_ATTENTION_H

#include <stdint.h>

enum { KV_F32 = 0, KV_BF16 = 1, KV_INT8 = 2 };

typedef struct {
    uint8_t *data;
    int64_t layer_bytes, block_bytes;
    int32_t format, block_tokens, kv_heads, head_dim;
} cache_t;

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

/* Bytes of a block for all layers' worth of one layer. */
int64_t kv_block_bytes(int32_t format, int32_t block_tokens, int32_t kv_heads, int32_t head_dim);

/* Store a token's keys and values, [kv_heads, head_dim] each. */
void kv_write(const cache_t *c, int32_t layer, int32_t slot, const float *k, const float *v);

/* Floats that one thread needs to attend, and that all need together to share few long sequences. */
int64_t attention_floats(int32_t head_dim);
int64_t attention_shared_floats(int32_t threads, int32_t head_dim);

/* Whether attend() will be shared by parts of contexts, and so wants a barrier and attend_merge() after it. */
int attention_is_split(const attend_t *a, const cache_t *c, int32_t threads);

/* Do as much as is left of the work that `next`, 0 before the first thread comes, counts; own: attention_floats, shared: of all threads. */
void attend(const attend_t *a, const cache_t *c, int32_t layer, int split, int32_t *next, float *own, float *shared);

/* Merge what parts gave, the share of thread `ith` of `nth`. */
void attend_merge(const attend_t *a, const cache_t *c, float *shared, int32_t ith, int32_t nth);

#endif
