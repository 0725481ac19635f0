/* Floats in the room as integers: int8, or two digits of a 16-bit fixed-point number; and as bf16. */
#include <math.h>
#include <string.h>

#include "linear_ways.h"

static const float DIGITS_LIMIT = 32600.0f; /* two balanced digits reach 127 * 256 + 127 = 32,639 */

/* The largest |x|, or NaN or infinity if there is one: read as integers, they are larger than any number. */
static float largest(const float *x, int32_t k) {
    uint32_t best = 0;
    for (int32_t i = 0; i < k; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        best = bits > best ? bits : best;
    }
    float value;
    memcpy(&value, &best, 4);
    return value;
}

row_t row_of(const linear_t *w, const act_t *a, const room_t *r, int32_t token, int32_t tile) {
    int32_t start = first_token(a->m, tile, r->tiles), tokens = first_token(a->m, tile + 1, r->tiles) - start;
    row_t row = {a->x + (int64_t)token * a->ldx, (int64_t)start * r->digits, tokens * r->digits, (token - start) * r->digits, 0.0f};
    float size = largest(row.x, w->k), limit = r->digits == 1 ? 127.0f : DIGITS_LIMIT;
    int is_finite = size <= 3e38f;
    size = size > 1e-30f ? size : 1e-30f;
    row.per_step = is_finite ? limit / size : 0.0f;
    r->scale[token] = is_finite ? size / limit : NAN;
    return row;
}

/* Digits of `count` inputs, the rest zero. */
static void digits_of(const float *x, int32_t count, int32_t digits, float per_step, int8_t digit[2][CHUNK]) {
    memset(digit, 0, 2 * CHUNK);
    for (int32_t i = 0; digits == 1 && i < count; i++) digit[0][i] = (int8_t)(int32_t)rintf(x[i] * per_step);
    for (int32_t i = 0; digits == 2 && i < count; i++) {
        int32_t value = (int32_t)rintf(x[i] * per_step);
        int8_t low = (int8_t)value;
        digit[1][i] = low;
        digit[0][i] = (int8_t)((value - low) >> 8);
    }
}

static int32_t sum_of(const int8_t *digit, int32_t count) {
    int32_t sum = 0;
    for (int32_t i = 0; i < count; i++) sum += digit[i];
    return sum;
}

/* Write digits of inputs from..until-1 into a row's column of the tile. */
static void place(const linear_t *w, const room_t *r, const int8_t *digit, const row_t *row, int32_t d, int32_t from, int32_t until) {
    uint32_t flip = w->format == I8 ? 0x80808080u : 0;
    for (int32_t k = from; k < until; k += 64) {
        int64_t step;
        uint8_t *column = quadruple(r, row, d, k, &step);
        for (int32_t i = k - from; i < k - from + 64; i += 4, column += step) {
            uint32_t four;
            memcpy(&four, digit + i, 4);
            four ^= flip;
            memcpy(column, &four, 4);
        }
    }
    for (int32_t i = from; w->format == I4 && !r->is_blocked && i < until; i += w->group)
        r->sums[row->before * r->groups + (int64_t)(i / w->group) * row->rows + row->row + d] = -8 * sum_of(digit + i - from, w->group);
}

void quantise_portable(const linear_t *w, const room_t *r, const row_t *row, int32_t first, int32_t last) {
    for (int32_t from = first; from < last; from += CHUNK) {
        int8_t digit[2][CHUNK];
        int32_t known = w->k - from < CHUNK ? w->k - from : CHUNK, until = from + CHUNK < r->k ? from + CHUNK : r->k;
        digits_of(row->x + from, row->per_step > 0.0f && known > 0 ? known : 0, r->digits, row->per_step, digit);
        for (int32_t d = 0; d < r->digits; d++) place(w, r, digit[d], row, d, from, until);
    }
}

/* NaN stays NaN. */
static uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)(bits >> 16 | 64) : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void pair_portable(const linear_t *w, const room_t *r, const row_t *row, int32_t first, int32_t last) {
    for (int32_t k = first; k < last; k += 32) {
        uint16_t *to = (uint16_t *)line_of_pairs(r, row, k);
        for (int32_t i = 0; i < 32; i++) to[i] = k + i < w->k ? to_bf16(row->x[k + i]) : 0;
    }
}
