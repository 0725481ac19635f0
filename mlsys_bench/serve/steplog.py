"""What every step of a served engine was and how long it took: written by the engine process, read by whoever fits a profile to it.

One line of CSV per step, times by the clock of the wall, so that a client's own times on the same machine can be set beside them.  A
step's time runs from the moment the engine looks for new requests to the moment its tokens are handed on: the step and all the loop around
it, which is what requests wait for.  Beside it stands the CPU time of the engine's thread, which tells a slow step from one whose core
others had.  One line costs some 5 µs, after the step's time was taken.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput

Floats = npt.NDArray[np.float64]
COLUMNS = (
    "begun_unix_s", "step_s", "was_busy", "added",
    "decode_seqs", "decode_kv_tokens", "prefill_tokens", "prefill_pairs", "sampled_tokens",
    "cpu_s",
)  # fmt: skip


class StepLog:
    """An open log."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._unix_s = time.time() - time.perf_counter()
        file.write(",".join(COLUMNS) + "\n")

    @staticmethod
    def open(path: str | None) -> StepLog | None:
        """Return a log in this file, or None where there is to be none.  Lines reach the file as they come."""
        if path is None:
            return None
        try:
            return StepLog(Path(path).open("w", buffering=1))
        except OSError as error:
            raise BadInput(f"--step-log {path}: cannot be written: {error.strerror}; name a file in a folder that exists") from None

    def write(self, begun_s: float, ended_s: float, was_busy: bool, added: int, features: Sequence[float], cpu_s: float) -> None:
        """Add a step, its times by `time.perf_counter`.  `was_busy`: it followed another one at once.  `added`: requests that joined."""
        d, k, p, q, s = features
        self._file.write(f"{self._unix_s + begun_s:.6f},{ended_s - begun_s:.7f},{was_busy:d},{added},{d},{k},{p},{q},{s},{cpu_s:.7f}\n")

    def close(self) -> None:
        """End the log."""
        self._file.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The steps of a log, in order."""

    begun_unix_s: Floats
    step_s: Floats
    was_busy: Floats
    added: Floats
    features: Floats  # [steps, 5], in the order of `latency.FEATURES`
    cpu_s: Floats

    def between(self, start_unix_s: float, end_unix_s: float) -> Steps:
        """Return the steps that began in a span of time."""
        kept = (self.begun_unix_s >= start_unix_s) & (self.begun_unix_s < end_unix_s)
        return Steps(
            begun_unix_s=self.begun_unix_s[kept],
            step_s=self.step_s[kept],
            was_busy=self.was_busy[kept],
            added=self.added[kept],
            features=self.features[kept],
            cpu_s=self.cpu_s[kept],
        )

    @property
    def ended_unix_s(self) -> Floats:
        """When the tokens of each step were handed on."""
        return self.begun_unix_s + self.step_s


def read(path: Path) -> Steps:
    """Return the steps of a log that may still be growing: a last line without an end is left out."""
    head, _, body = path.read_text().partition("\n")
    if tuple(head.split(",")) != COLUMNS:
        raise BadInput(f"{path}: not a log of engine steps; make one with mlsys serve --step-log FILE")
    whole = body[: body.rfind("\n") + 1]
    table = np.array([line.split(",") for line in whole.splitlines()], dtype=np.float64).reshape(-1, len(COLUMNS))
    return Steps(
        begun_unix_s=table[:, 0], step_s=table[:, 1], was_busy=table[:, 2], added=table[:, 3], features=table[:, 4:9], cpu_s=table[:, 9]
    )
