/* See kv.h. */
#include "kv.h"

int64_t kv_block_bytes(int32_t format, int32_t block_tokens, int32_t kv_heads, int32_t head_dim) {
    return kv_heads * head_bytes(format, block_tokens, head_dim);
}

/* to[i * stride] = x[i] in steps of the scale that makes the largest 127; stride 1 or more. */
static void write_int8(int8_t *to, int32_t stride, const float *x, int32_t n, float *scale) {
    int32_t i = 0;
    floats sizes = each(0);
    for (; i + LANES <= n; i += LANES)
        sizes = larger(sizes, size_of(load(x + i))); /* the second, where one is no number */
    float size = largest_of(sizes), by;
    for (; i < n; i++)
        size = size > fabsf(x[i]) ? size : fabsf(x[i]);
    *scale = size / 127;
    by = size > 0 ? 127 / size : 0;
    for (i = 0; i + LANES <= n; i += LANES) {
        const ints rounded = (ints)(load(x + i) * by + 12582912.0f) - 0x4b400000;
        for (int j = 0; j < LANES; j++)
            to[(int64_t)(i + j) * stride] = (int8_t)rounded[j];
    }
    for (; i < n; i++)
        to[(int64_t)i * stride] = (int8_t)lrintf(x[i] * by);
}

static void write_head(const cache_t *c, uint8_t *head, int32_t at, const float *k, const float *v) {
    const int32_t d = c->head_dim, bt = c->block_tokens;
    if (c->format == KV_F32) {
        float *keys = (float *)head, *values = keys + d * bt + at * d;
        for (int32_t i = 0; i < d; i++)
            keys[i * bt + at] = k[i], values[i] = v[i];
    } else if (c->format == KV_BF16) {
        uint16_t *keys = (uint16_t *)head, *values = keys + d * bt + at * d;
        for (int32_t i = 0; i < d; i++)
            keys[i * bt + at] = float_to_bf16(k[i]), values[i] = float_to_bf16(v[i]);
    } else {
        int8_t *keys = (int8_t *)head;
        float *scale = scales_of(c, head);
        write_int8(keys + at, bt, k, d, scale + at);
        write_int8(keys + d * bt + at * d, 1, v, d, scale + bt + at);
    }
}

void kv_write(const cache_t *c, int32_t layer, int32_t slot, int32_t head, const float *k, const float *v) {
    write_head(c, head_of(c, layer, slot / c->block_tokens, head), slot % c->block_tokens, k, v);
}
