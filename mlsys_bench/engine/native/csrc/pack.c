/* Matrices as they are stored, [n][k], into the panels of linear.h; what is padded must be zero beforehand. */
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "linear.h"

enum { PANEL = 16 };

/* Put pieces of four bytes of 16 rows side by side, written as one stream. */
static void interleave_panel(const char *from, int64_t row_bytes, int64_t pieces, char *to) {
    for (int64_t piece = 0; piece < pieces; piece++)
        for (int64_t row = 0; row < PANEL; row++, to += 4) memcpy(to, from + row * row_bytes + 4 * piece, 4);
}

/* Put row-major `unit`-byte pieces side by side: [n][pieces][unit] -> [n/16][padded][16][unit]. */
static void interleave(const char *from, int64_t n, int64_t row_bytes, int64_t unit, int64_t padded, char *to) {
    for (int64_t row = 0; row < n; row++) {
        int64_t done = 0;
        if (unit == 4 && row / PANEL < n / PANEL) {
            done = row_bytes / 4;
            if (row % PANEL == 0) interleave_panel(from + row * row_bytes, row_bytes, done, to + row / PANEL * padded * PANEL * 4);
        }
        const char *piece = from + row * row_bytes + done * unit;
        char *at = to + ((row / PANEL * padded + done) * PANEL + row % PANEL) * unit;
        int64_t left = row_bytes - done * unit;
        for (; left >= unit; left -= unit, piece += unit, at += PANEL * unit) memcpy(at, piece, (size_t)unit);
        memcpy(at, piece, (size_t)left);
    }
}

/* F32 (bytes = 4), BF16 (2) and I8 (1): pieces of four bytes. */
void pack_rows(const void *from, int64_t n, int64_t k, int64_t bytes, int64_t padded_k, void *to) {
    interleave(from, n, k * bytes, 4, padded_k * bytes / 4, to);
}

/* What sums of I8 begin with, see linear.h.  start: [n] */
void pack_starts(const int8_t *from, int64_t n, int64_t k, int32_t *start) {
    for (int64_t row = 0; row < n; row++) {
        int32_t sum = 0;
        for (int64_t i = 0; i < k; i++) sum += from[row * k + i];
        start[row] = -128 * sum;
    }
}

/* I4: pairs of neighbours (low nibble first) become quadruples, the first of eight in the low nibbles. */
void pack_nibbles(const uint8_t *from, int64_t n, int64_t k, int64_t padded_k, uint8_t *to) {
    for (int64_t row = 0; row < n; row++) {
        uint8_t *at = to + (row / PANEL * (padded_k / 8) * PANEL + row % PANEL) * 4;
        for (int64_t i = 0; i < k / 2; i += 4, at += 4 * PANEL) {
            uint8_t b[4] = {0};
            memcpy(b, from + row * (k / 2) + i, (size_t)(k / 2 - i < 4 ? k / 2 - i : 4));
            at[0] = (uint8_t)((b[0] & 15) | b[2] << 4);
            at[1] = (uint8_t)(b[0] >> 4 | (b[2] & 0xf0));
            at[2] = (uint8_t)((b[1] & 15) | b[3] << 4);
            at[3] = (uint8_t)(b[1] >> 4 | (b[3] & 0xf0));
        }
    }
}

/* Scales and zeros of I4: [n][groups] -> [n/16][padded_groups][16]. */
void pack_groups(const char *from, int64_t n, int64_t groups, int64_t bytes, int64_t padded_groups, char *to) {
    interleave(from, n, groups * bytes, bytes, padded_groups, to);
}

/* Ask for large pages before memory is touched first: a stream through gigabytes then misses the TLB 512 times less often. */
void advise_large_pages(void *at, int64_t bytes) {
#ifdef __linux__
    uintptr_t page = 1 << 21, first = ((uintptr_t)at + page - 1) & ~(page - 1), last = ((uintptr_t)at + (uintptr_t)bytes) & ~(page - 1);
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
#else
    (void)at, (void)bytes;
#endif
}
