/* See kv.h. */
#include "kv.h"

int64_t kv_block_bytes(int32_t format, int32_t block_tokens, int32_t kv_heads, int32_t head_dim) {
    return kv_heads * head_bytes(format, block_tokens, head_dim);
}

/* x in steps of the scale that makes the largest 127, pairs of them `stride` apart; 2 is one after the other. */
static void write_int8(int8_t *to, int32_t stride, const float *x, int32_t n, float *scale) {
    const float size = largest_size_in(x, n), by = size > 0 ? 127 / size : 0;
    int32_t i = 0;
    *scale = size / 127;
    for (; i + LANES <= n; i += LANES) {
        const ints rounded = (ints)(load(x + i) * by + 12582912.0f) - 0x4b400000;
        for (int j = 0; j < LANES; j++)
            to[(int64_t)(i + j) / 2 * stride + j % 2] = (int8_t)rounded[j];
    }
    for (; i < n; i++)
        to[(int64_t)i / 2 * stride + i % 2] = (int8_t)lrintf(x[i] * by);
}

static void write_head(const cache_t *c, uint8_t *head, int32_t at, const float *k, const float *v) {
    const int32_t d = c->head_dim, bt = c->block_tokens;
    if (c->format == KV_F32) {
        float *keys = (float *)head, *values = keys + d * bt + at * d;
        for (int32_t i = 0; i < d; i++)
            keys[i * bt + at] = k[i], values[i] = v[i];
    } else if (c->format == KV_BF16) {
        uint32_t *keys = (uint32_t *)head;
        uint16_t *values = (uint16_t *)head + d * bt + at * d;
        for (int32_t i = 0; i < d / 2; i++)
            keys[i * bt + at] = float_to_bf16(k[2 * i]) | (uint32_t)float_to_bf16(k[2 * i + 1]) << 16;
        for (int32_t i = 0; i < d; i++)
            values[i] = float_to_bf16(v[i]);
    } else {
        int8_t *keys = (int8_t *)head;
        float *scale = scales_of(c, head);
        write_int8(keys + 2 * at, 2 * bt, k, d, scale + at);
        write_int8(keys + d * bt + at * d, 2, v, d, scale + bt + at);
    }
}

void kv_write(const cache_t *c, int32_t layer, int32_t slot, int32_t head, const float *k, const float *v) {
    write_head(c, head_of(c, layer, slot / c->block_tokens, head), slot % c->block_tokens, k, v);
}
