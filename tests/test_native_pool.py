"""The pool of threads: everyone takes part once, barriers hold, and more threads than cores still get through."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from ctypes import CFUNCTYPE, c_int32, c_void_p

import pytest

from mlsys_bench.engine.native import library

pytestmark = pytest.mark.skipif(library.load() is None, reason=f"no C kernels: {library.why_not()}")
WORK = CFUNCTYPE(None, c_void_p, c_int32, c_int32)


def run(threads: int, work: object) -> None:
    c = library.need()
    c.pool_run.restype, c.pool_run.argtypes = None, (c_int32, WORK, c_void_p)
    c.pool_run(threads, work, None)


def everyone(threads: int) -> list[tuple[int, int, int]]:
    """Return (ith, nth, thread) of all that took part."""
    seen: list[tuple[int, int, int]] = []
    run(threads, WORK(lambda _arg, ith, nth: seen.append((ith, nth, threading.get_ident()))))
    return seen


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_everyone_takes_part_once(threads: int) -> None:
    for _ in range(20):
        seen = everyone(threads)
        assert sorted((ith, nth) for ith, nth, _ in seen) == [(ith, threads) for ith in range(threads)]
        assert len({ident for _, _, ident in seen}) == threads


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_nobody_passes_a_barrier_before_all_have_come(threads: int) -> None:
    """More threads than cores too: whoever waits gives way."""
    rounds, arrived, early = 40, [0] * threads, []

    def work(_arg: object, ith: int, nth: int) -> None:
        for done in range(1, rounds + 1):
            arrived[ith] = done
            library.need().pool_barrier()
            if min(arrived) < done:
                early.append((ith, done))
            library.need().pool_barrier()

    run(threads, WORK(work))
    assert arrived == [rounds] * threads
    assert not early


def test_a_run_inside_a_run_is_done_by_the_thread_itself() -> None:
    seen: list[tuple[int, int]] = []

    def alone(_arg: object, ith: int, nth: int) -> None:
        library.need().pool_barrier()
        seen.append((ith, nth))

    inner = WORK(alone)
    run(3, WORK(lambda _arg, _ith, _nth: run(2, inner)))
    assert seen == [(0, 1)] * 3


def test_callers_take_turns() -> None:
    inside, most = [0], [0]
    lock = threading.Lock()

    def work(_arg: object, ith: int, _nth: int) -> None:
        if ith == 0:
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
        library.need().pool_barrier()
        if ith == 0:
            with lock:
                inside[0] -= 1

    def call() -> None:
        for _ in range(20):
            run(2, WORK(work))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert most == [1]


SCRIPT = """
import ctypes, os, sys
c = ctypes.CDLL(sys.argv[1])
WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)
def run(threads):
    seen = []
    c.pool_run(threads, WORK(lambda arg, ith, nth: (c.pool_barrier(), seen.append(ith))[1]), None)
    return sorted(seen)
"""


def script(body: str) -> str:
    """Run a program that has the pool and no torch; return what it prints.  It is ended after a minute, which fails the test."""
    path = library.built_path()
    done = subprocess.run([sys.executable, "-c", SCRIPT + body, path], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_it_survives_a_fork_and_the_end_of_the_process() -> None:
    """The child has a pool of its own; both leave while their workers sleep or spin."""
    body = """
print(run(3), flush=True)
child = os.fork()
if child == 0:
    print(run(3), flush=True)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), run(4))
"""
    assert script(body).splitlines() == ["[0, 1, 2]", "[0, 1, 2]", "7 [0, 1, 2, 3]"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_threads_keep_to_the_cores_of_the_process() -> None:
    body = """
run(3)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
run(3)
print(len({tuple(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")}), len(os.listdir("/proc/self/task")))
"""
    assert script(body) == "1 3"


def test_hundreds_of_threads_on_few_cores_end() -> None:
    assert script("print(run(300) == list(range(256)))") == "True"


def test_the_library_is_where_it_says() -> None:
    assert ctypes.CDLL(library.built_path()).cpu_best() == library.need().cpu_best()
