/* The paged cache of keys and values.
 *
 * A block holds the tokens of block_tokens positions in a row, head by head: of each head first the keys, [head_dim][block_tokens], BF16
 * and INT8 as pairs of dimensions, [head_dim / 2][block_tokens][2], so that one vector holds the same dimensions of neighbouring keys and no
 * sum of a score runs across lanes; then the values, [block_tokens][head_dim]; then, INT8 only, a float scale of each key and of each
 * value, [2][block_tokens].  head_dim is even, but for F32.
 */
#ifndef MLSYS_KV_H
#define MLSYS_KV_H

#include "vector.h"

enum { KV_F32 = 0, KV_BF16 = 1, KV_INT8 = 2 };

typedef struct {
    uint8_t *data;
    int64_t layer_bytes, block_bytes;
    int32_t format, block_tokens, kv_heads, head_dim;
} cache_t;

/* Bytes of a block in one layer. */
int64_t kv_block_bytes(int32_t format, int32_t block_tokens, int32_t kv_heads, int32_t head_dim);

/* Store a token's key and value of one head, [head_dim] each. */
void kv_write(const cache_t *c, int32_t layer, int32_t slot, int32_t head, const float *k, const float *v);

INLINE int64_t head_bytes(int32_t format, int32_t block_tokens, int32_t head_dim) {
    const int64_t values = 2 * (int64_t)block_tokens * head_dim;
    return format == KV_F32 ? 4 * values : format == KV_BF16 ? 2 * values : values + 8 * (int64_t)block_tokens;
}

/* Where a head of a block begins. */
INLINE uint8_t *head_of(const cache_t *c, int32_t layer, int32_t block, int32_t head) {
    return c->data + layer * c->layer_bytes + block * c->block_bytes + head * head_bytes(c->format, c->block_tokens, c->head_dim);
}

/* The scales of a head's keys in a block; those of its values follow. */
INLINE float *scales_of(const cache_t *c, uint8_t *head) { return (float *)(head + 2 * (int64_t)c->block_tokens * c->head_dim); }

/* Values i .. i + 15 from a base, or value i, as they are kept: scales are another matter. */
INLINE floats load_as(int32_t format, const uint8_t *base, int64_t i) {
    if (format == KV_F32)
        return load((const float *)base + i);
    if (format == KV_BF16)
        return from_bf16(*(const halves_at *)((const uint16_t *)base + i));
    return from_int8(*(const bytes_at *)((const int8_t *)base + i));
}

#endif
