"""How fast this machine reads memory with so many threads: a small C program of its own, which answers each line with bytes a second.

Where there is no compiler, torch's matrix-vector product reads in its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PASSES = 7, MOST = 64 };
static const size_t floats = (size_t)1 << 28; /* 1 GiB: beyond any cache */
static float *room;
static int threads;
static volatile float kept[MOST * 16];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Four sums, so that no addition waits for the one before. */
static void *read_share(void *which) {
    size_t share = floats / threads, i;
    const float *x = room + share * (size_t)which;
    float a = 0, b = 0, c = 0, d = 0;
    for (i = 0; i < share / 4; i++) {
        a += x[i];
        b += x[i + share / 4];
        c += x[i + share / 2];
        d += x[i + share / 4 * 3];
    }
    kept[16 * (size_t)which] = a + b + c + d;
    return NULL;
}

static double pass(void) {
    pthread_t other[MOST];
    size_t i;
    double began = now();
    for (i = 1; i < (size_t)threads; i++) pthread_create(&other[i], NULL, read_share, (void *)i);
    read_share((void *)0);
    for (i = 1; i < (size_t)threads; i++) pthread_join(other[i], NULL);
    return now() - began;
}

static int ascending(const void *a, const void *b) { return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b); }

int main(int count, char **words) {
    char line[64];
    threads = count > 1 ? atoi(words[1]) : 1;
    room = aligned_alloc(64, floats * sizeof(float));
    if (!room || threads < 1 || threads > MOST) return 1;
    memset(room, 1, floats * sizeof(float));
    puts("{}");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        double took[PASSES];
        int i;
        for (i = 0; i < PASSES; i++) took[i] = pass();
        qsort(took, PASSES, sizeof *took, ascending);
        printf("{\"rate\": %.0f}\n", floats * sizeof(float) / took[PASSES / 2]);
        fflush(stdout);
    }
    return 0;
}
"""

TORCH = """
import json, statistics, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
matrix, vector = torch.ones(2**16, 2**12), torch.ones(2**12)
print("{}", flush=True)
for _ in sys.stdin:
    took = []
    for _ in range(7):
        began = time.perf_counter()
        torch.mv(matrix, vector)
        took.append(time.perf_counter() - began)
    print(json.dumps({"rate": 4 * matrix.numel() / statistics.median(took)}), flush=True)
"""


def command(threads: int) -> list[str]:
    """Return the command of a process that reads 1 GiB for each line it is given."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return [sys.executable, "-c", TORCH, str(threads)]
    folder = Path(tempfile.gettempdir()) / f"mlsys-proof-read-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    (folder / "read.c").write_text(SOURCE)
    subprocess.run([compiler, "-O3", "-march=native", "-ffast-math", "-pthread", "-o", folder / "read", folder / "read.c"], check=True)
    return [str(folder / "read"), str(threads)]
