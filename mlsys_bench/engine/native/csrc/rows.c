/* See rows.h. */
#include "rows.h"

#include "linear.h"
#include "vector.h"

static float sum_of_squares(const float *x, int32_t n) {
    floats sum[4] = {each(0), each(0), each(0), each(0)};
    int32_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) {
            const floats v = load(x + i + j * LANES);
            sum[j] += v * v;
        }
    float rest = 0;
    for (; i < n; i++)
        rest += x[i] * x[i];
    return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

void norm_row(float *y, const float *x, int32_t n, float eps, const float *gain) {
    const float by = 1 / sqrtf(sum_of_squares(x, n) + n * eps);
    if (gain)
        for (int32_t i = 0; i < n; i++)
            y[i] = x[i] * by * gain[i];
    else
        for (int32_t i = 0; i < n; i++)
            y[i] = x[i] * by;
}

void add_row(float *x, const float *y, int32_t n) {
    for (int32_t i = 0; i < n; i++)
        x[i] += y[i];
}

void rope_row(float *x, int32_t heads, int32_t head_dim, int32_t dim, const float *cos, const float *sin) {
    const int32_t half = dim / 2;
    for (int32_t h = 0; h < heads; h++) {
        float *a = x + h * head_dim, *b = a + half;
        int32_t i = 0;
        for (; i + LANES <= half; i += LANES) {
            const floats was = load(a + i), other = load(b + i), c = load(cos + i), s = load(sin + i);
            store(a + i, was * c - other * s);
            store(b + i, other * c + was * s);
        }
        for (; i < half; i++) {
            const float was = a[i];
            a[i] = was * cos[i] - b[i] * sin[i];
            b[i] = b[i] * cos[i] + was * sin[i];
        }
    }
}

/* x sigmoid(t); for silu t = x, for gelu t = 2 sqrt(2 / pi) (x + 0.044715 x^3), since (1 + tanh(t / 2)) / 2 = sigmoid(t) */
INLINE floats gated(floats x, floats up, int32_t gelu) {
    const floats t = gelu ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
    return x / (exp_of(-t) + 1) * up;
}

void gated_row(float *y, const float *gate, const float *up, int32_t first, int32_t last, int32_t gelu) {
    int32_t i = first;
    for (; i + LANES <= last; i += LANES)
        store(y + i, gated(load(gate + i), load(up + i), gelu));
    if (i < last) {
        float g[LANES] = {0}, u[LANES] = {0};
        memcpy(g, gate + i, (last - i) * sizeof(float));
        memcpy(u, up + i, (last - i) * sizeof(float));
        store(g, gated(load(g), load(u), gelu));
        memcpy(y + i, g, (last - i) * sizeof(float));
    }
}

void embed_row(float *x, const void *table, int32_t format, int32_t packed, int32_t token, int32_t n, float scale) {
    const int64_t k = packed ? linear_padded_k(format, 0, n) : n, pair = format == BF16 ? 2 : 1;
    const int64_t from = packed ? token / 16 * 16 * k + token % 16 * pair : token * k;
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = from + (packed ? i / pair * 16 * pair + i % pair : i);
        x[i] = (format == BF16 ? bf16_to_float(((const uint16_t *)table)[at]) : ((const float *)table)[at]) * scale;
    }
}
