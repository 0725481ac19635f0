/* Every format in plain C: what the fast ways are held against, and what any processor can run. */
#include <math.h>
#include <string.h>

#include "linear_ways.h"

/* The rows of one token in its tile. */
typedef struct {
    int64_t before;      /* rows of earlier tiles */
    int32_t rows, row;   /* of the tile; of the token in it */
    float scale;
} place_t;

static void floats(const linear_t *w, const room_t *r, const place_t *at, int32_t panel, float *sum) {
    const float *x = (const float *)r->data + at->before * r->k + at->row;
    const float *f32 = (const float *)w->weight + (int64_t)panel * r->k * PANEL;
    const uint16_t *bf16 = (const uint16_t *)w->weight + (int64_t)panel * r->k * PANEL;
    for (int32_t k = 0; k < r->k; k++)
        for (int32_t lane = 0; lane < PANEL; lane++) {
            int64_t pair = (int64_t)(k / 2 * PANEL + lane) * 2 + k % 2;
            float weight = w->format == F32 ? f32[(int64_t)k * PANEL + lane] : from_bits((uint32_t)bf16[pair] << 16);
            sum[lane] = MULTIPLY_ADD(x[(int64_t)k * at->rows], weight, sum[lane]);
        }
}

static void bytes(const linear_t *w, const room_t *r, const place_t *at, int32_t panel, float *sum) {
    uint32_t digit_sum[2][PANEL];
    for (int32_t d = 0; d < r->digits; d++) {
        const uint8_t *x = r->data + at->before * r->k + 4 * (at->row + d);
        const int8_t *weight = (const int8_t *)w->weight + (int64_t)panel * r->k * PANEL;
        memcpy(digit_sum[d], w->start + panel * PANEL, sizeof digit_sum[d]);
        for (int32_t k = 0; k < r->k; k += 4, x += 4 * at->rows, weight += 4 * PANEL)
            for (int32_t i = 0; i < 4 * PANEL; i++) digit_sum[d][i / 4] += (uint32_t)(x[i % 4] * weight[i]);
    }
    const float *scale = (const float *)w->scale + panel * PANEL;
    for (int32_t lane = 0; lane < PANEL; lane++) {
        float top = (float)(int32_t)digit_sum[0][lane];
        float all = r->digits == 1 ? top : top * 256.0f + (float)(int32_t)digit_sum[1][lane];
        sum[lane] = all * at->scale * scale[lane];
    }
}

static void nibbles_of_group(const linear_t *w, const room_t *r, const place_t *at, int32_t panel, int32_t g, int32_t *digit_sum) {
    const int8_t *x = (const int8_t *)r->data + at->before * r->k + (int64_t)g * w->group * at->rows + 4 * at->row;
    const uint8_t *weight = (const uint8_t *)w->weight + ((int64_t)panel * r->k + g * w->group) * PANEL / 2;
    for (int32_t k = 0; k < w->group; k += 8, x += 8 * at->rows, weight += 4 * PANEL)
        for (int32_t i = 0; i < 4 * PANEL; i++)
            digit_sum[i / 4] += x[i % 4] * (weight[i] & 15) + x[i % 4 + 4 * at->rows] * (weight[i] >> 4);
}

static void nibbles(const linear_t *w, const room_t *r, const place_t *at, int32_t panel, float *sum) {
    for (int32_t g = 0; g < r->groups; g++) {
        int32_t digit_sum[2][PANEL];
        int64_t place = ((int64_t)panel * r->groups + g) * PANEL;
        for (int32_t d = 0; d < r->digits; d++) {
            int32_t minus_eight = r->sums[at->before * r->groups + (int64_t)g * at->rows + at->row + d];
            for (int32_t lane = 0; lane < PANEL; lane++)
                digit_sum[d][lane] = w->zero ? minus_eight / 8 * w->zero[place + lane] : minus_eight;
            place_t row = *at;
            row.row += d;
            nibbles_of_group(w, r, &row, panel, g, digit_sum[d]);
        }
        for (int32_t lane = 0; lane < PANEL; lane++) {
            int32_t top = digit_sum[0][lane], all = r->digits == 1 ? top : top * 256 + digit_sum[1][lane];
            sum[lane] = MULTIPLY_ADD((float)all, half_to_float(((const uint16_t *)w->scale)[place + lane]), sum[lane]);
        }
    }
    for (int32_t lane = 0; lane < PANEL; lane++) sum[lane] *= at->scale;
}

void linear_portable(const linear_t *w, const act_t *a, float *y, int32_t ldy, int32_t first, int32_t last) {
    room_t r = room_of(w, a);
    for (int32_t panel = first; panel < last; panel++)
        for (int32_t tile = 0; tile < r.tiles; tile++) {
            int32_t start = first_token(a->m, tile, r.tiles), end = first_token(a->m, tile + 1, r.tiles);
            for (int32_t token = start; token < end; token++) {
                float sum[PANEL] = {0};
                place_t at = {(int64_t)start * r.digits, (end - start) * r.digits, (token - start) * r.digits, r.scale[token]};
                (w->format == I8 ? bytes : w->format == I4 ? nibbles : floats)(w, &r, &at, panel, sum);
                for (int32_t lane = 0; lane < PANEL && panel * PANEL + lane < w->n; lane++)
                    y[(int64_t)token * ldy + panel * PANEL + lane] = sum[lane] + (w->bias ? w->bias[panel * PANEL + lane] : 0.0f);
            }
        }
}
