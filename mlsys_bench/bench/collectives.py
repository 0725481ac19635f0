"""What passing data between processes costs: all-reduce, all-gather and point to point over `torch.distributed`, each rank a process.

    python -m mlsys_bench.bench.collectives RANK RANKS BACKEND CORE           a rank; its parent speaks to it in JSON lines
    rank 0: {"port": p};  the others: {"port": p} from the parent             where they meet, on this machine
    {"ask": op, "bytes": n, "repeat": k}  ->  {"seconds": s, "error": e}      s: of k operations together; e: what the result was off by

gloo on a CPU, NCCL where there are two GPUs or more.  Rates are those of nccl-tests (its doc/PERFORMANCE.md): algbw is bytes / time, busbw
algbw times 2 (n-1)/n for all-reduce, (n-1)/n for all-gather, 1 for point to point; bytes are the input of a rank, for all-gather what each
rank ends with.  A rank ends when its standard input does, in the middle of an operation too, so that none outlives its parent.
"""

from __future__ import annotations

import datetime
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any

from mlsys_bench.bench.harness import Sampled, Spec, Task
from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.types import Round, Scalar, Work

OPS = ("all_reduce", "all_gather", "send_recv")
RATES = ("algbw", "busbw")
SIZES = (2**10, 2**14, 2**18, 2**22, 2**26)
PATIENCE_S = 30.0  # for one answer: longer means that a rank is gone, or stuck
SAMPLES, SAMPLE_S = 5, 4e-3
TOLERANCE = 0.0  # sums of small integers are exact


def bus_factor(op: str, ranks: int) -> float:
    """Return busbw / algbw."""
    return {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": (ranks - 1) / ranks, "send_recv": 1.0}[op]


def lonely(ranks: int, device: str) -> str | None:
    """Return why so many processes cannot exchange tensors here, None where they can."""
    import torch

    if ranks < 2:
        return f"there is one {'GPU' if device != 'cpu' else 'core'}, and so nobody to talk to"
    return None if torch.distributed.is_available() else "this torch has no torch.distributed"


class Ranks:
    """The processes, started when they are first asked."""

    def __init__(self, ranks: int, backend: str, cores: Sequence[int]) -> None:
        self.ranks, self.backend, self.cores = ranks, backend, tuple(cores)
        self._children: list[subprocess.Popen[str]] = []

    def ask(self, op: str, size: int, repeat: int) -> tuple[float, float]:
        """Return the seconds of so many operations, of the slowest rank, and the largest error.  Raises MeasurementFailed."""
        if not self._children:
            self._start()
        for child in self._children:
            self._tell(child, {"ask": op, "bytes": size, "repeat": repeat})
        answers = [self._answer(rank, child) for rank, child in enumerate(self._children)]
        return max(a["seconds"] for a in answers), max(a["error"] for a in answers)

    def _start(self) -> None:
        for rank in range(self.ranks):
            core = str(self.cores[rank % len(self.cores)]) if self.cores and self.backend == "gloo" else "-"
            words = (str(rank), str(self.ranks), self.backend, core)
            environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
            command = [sys.executable, "-m", "mlsys_bench.bench.collectives", *words]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._children.append(subprocess.Popen(command, text=True, env=environment, **pipes))
        meeting = self._answer(0, self._children[0])
        for child in self._children[1:]:
            self._tell(child, meeting)
        for rank, child in enumerate(self._children):
            self._answer(rank, child)

    @staticmethod
    def _tell(child: subprocess.Popen[str], message: dict[str, Any]) -> None:
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(message) + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            pass  # it has said why, or `_answer` does

    def _answer(self, rank: int, child: subprocess.Popen[str]) -> dict[str, Any]:
        assert child.stdout is not None
        ready = select.select([child.stdout], [], [], PATIENCE_S)[0]
        line = child.stdout.readline() if ready else ""
        message: dict[str, Any] = json.loads(line) if line else {}
        if not line or "failed" in message:
            self.close()
            raise MeasurementFailed(
                f"collectives: rank {rank} of {self.ranks} ({self.backend}) "
                + (message.get("failed") or (f"gave no answer in {PATIENCE_S:g} s" if not ready else "ended without an answer"))
            )
        return message

    def close(self) -> None:
        """End the ranks."""
        for child in self._children:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()
        self._children.clear()


def tasks(ranks: Ranks, sizes: Sequence[int], common: dict[str, Scalar]) -> list[Task]:
    """Return a task per operation and size, each giving algbw and busbw."""
    about = common | {"backend": ranks.backend, "ranks": ranks.ranks}
    return [_task(ranks, op, size, about) for op in OPS for size in dict.fromkeys(sizes)]


def _task(ranks: Ranks, op: str, size: int, about: dict[str, Scalar]) -> Task:
    factor = {"algbw": 1.0, "busbw": bus_factor(op, ranks.ranks)}
    specs = tuple(
        Spec(
            name=f"collective.{op}", unit="B/s", better="higher", parameters=about | {"bytes": size, "rate": rate},
            work=Work(bytes=size * factor[rate]),
        )
        for rate in RATES
    )  # fmt: skip
    repeat = 0

    def visit() -> list[Sampled]:
        nonlocal repeat
        if not repeat:
            ranks.ask(op, size, 3)
            repeat = max(1, round(SAMPLE_S / (ranks.ask(op, size, 3)[0] / 3)))
        seconds = [ranks.ask(op, size, repeat)[0] / repeat for _ in range(SAMPLES)]
        return [(spec, Round(values=tuple(size * factor[rate] / s for s in seconds))) for spec, rate in zip(specs, RATES, strict=True)]

    return Task(specs=specs, visit=visit, cost_s=0.1 + size / 1e8, check=lambda: ranks.ask(op, size, 1)[1], tolerance=TOLERANCE)


# ---------------------------------------------------------------- a rank


def main(argv: Sequence[str]) -> int:
    """Answer until standard input ends."""
    rank, ranks, backend, core = int(argv[0]), int(argv[1]), argv[2], argv[3]
    asked = _asked(sys.stdin)
    if core != "-" and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core)})
    try:
        here = _Rank(rank, ranks, backend, asked)
        _say({"ready": True})
        while True:
            message = asked.get()
            _say(here.answer(message["ask"], message["bytes"], message["repeat"]))
    except RuntimeError as error:  # torch's, of any kind
        _say({"failed": str(error).splitlines()[0]})
        return 1


def _asked(lines: IO[str]) -> queue.Queue[dict[str, Any]]:
    """Return a queue of what is asked; the end of the lines ends this process, whatever it is doing."""
    found: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        for line in lines:
            found.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    return found


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


class _Rank:
    """One rank: its group and its buffers."""

    def __init__(self, rank: int, ranks: int, backend: str, asked: queue.Queue[dict[str, Any]]) -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        self.device = torch.device("cpu" if backend == "gloo" else f"cuda:{rank}")
        if backend != "gloo":
            torch.cuda.set_device(self.device)
        patience, is_first = datetime.timedelta(seconds=PATIENCE_S), rank == 0
        port = 0 if is_first else asked.get()["port"]
        store = dist.TCPStore("127.0.0.1", port, ranks, is_master=is_first, timeout=patience, wait_for_workers=False)  # type: ignore[attr-defined]
        if is_first:
            _say({"port": store.port})
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=patience)
        self.rank, self.ranks, self.torch, self.dist = rank, ranks, torch, dist

    def answer(self, op: str, size: int, repeat: int) -> dict[str, Any]:
        """Do it: once to be checked, then, all ranks at once, so often to be timed."""
        run, error = getattr(self, op)(max(1, size // 4))
        run()
        self._wait()
        found = error()
        self.dist.barrier()
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        self._wait()
        return {"seconds": time.perf_counter() - start, "error": found}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)

    def _values(self, count: int, rank: int) -> Any:
        """Return what a rank gives: 0 to 6 and its number."""
        return (self.torch.arange(count, device=self.device) % 7).float() + rank

    def all_reduce(self, count: int) -> tuple[Any, Any]:
        """Add up over ranks, in place."""
        x = self._values(count, self.rank)
        wanted = sum(self._values(count, rank) for rank in range(self.ranks))

        def error() -> float:
            off = float((x - wanted).abs().max())
            x.zero_()  # sums of sums would overflow
            return off

        return lambda: self.dist.all_reduce(x), error

    def all_gather(self, count: int) -> tuple[Any, Any]:
        """Gather the shares of all ranks."""
        each = max(1, count // self.ranks)
        mine, into = self._values(each, self.rank), [self.torch.full((each,), float("nan"), device=self.device) for _ in range(self.ranks)]

        def error() -> float:
            return float(max((part - self._values(each, rank)).abs().max() for rank, part in enumerate(into)))

        return lambda: self.dist.all_gather(into, mine), error

    def send_recv(self, count: int) -> tuple[Any, Any]:
        """Pass on to the next rank what is had, and take from the one before."""
        mine, into = self._values(count, self.rank), self.torch.full((count,), float("nan"), device=self.device)
        to, source = (self.rank + 1) % self.ranks, (self.rank - 1) % self.ranks
        P2POp, dist = self.dist.P2POp, self.dist

        def run() -> None:
            for request in dist.batch_isend_irecv([P2POp(dist.isend, mine, to), P2POp(dist.irecv, into, source)]):
                request.wait()

        return run, lambda: float((into - self._values(count, source)).abs().max())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
