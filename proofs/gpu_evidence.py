"""All evidence of one GPU with one command: is it right, how fast is it, and the records in one dated folder.

    nox -s bench -- gpu_evidence                      everything but `matrices`, about 30 minutes on an H200
    python proofs/gpu_evidence.py --list              the parts, and the minutes each may take
    python proofs/gpu_evidence.py --minutes 9         as many parts as surely fit; say it again to go on
    python proofs/gpu_evidence.py --parts decode-8b   these and no others, done before or not

Every part is processes of its own with a limit of 9 minutes, and writes `PART.log` and its records into
reports/evidence/DATE-GPU/; a part that is done is not done again.  Without a CUDA device it says so and proves nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S = 9 * 60
GPU = ["proofs/engine_gpu.py", "--out", "{out}", "--parts"]
BENCH = ["-m", "mlsys_cli", "bench", "gpu", "--device", "cuda:0", "--suite", "full"]


@dataclass(frozen=True, slots=True)
class Part:
    """Commands of this Python that belong together; `{out}` in them is the folder."""

    name: str
    about: str
    commands: tuple[list[str], ...]
    expected_s: int  # a guess: nobody has measured it
    is_asked_for: bool = False  # done only by name


PARTS = (
    Part("machine", "what this machine is", (["-m", "mlsys_cli", "doctor"], ["-m", "torch.utils.collect_env"]), 40),
    Part("right", "every kernel against float64, small and ragged", ([*GPU, "limits,tests"],), 360),
    Part("shapes", "every kernel against float64 at the sizes of an 8 B model", ([*GPU, "shapes"],), 180),
    Part("decode-8b", "8 B in bf16 and int8: decode at batch 1-64, prompts", ([*GPU, "decode", "--precisions", "bf16,int8"],), 360),
    Part("decode-8b-few-bits", "8 B in int4 and fp8", ([*GPU, "decode", "--precisions", "int4g64,fp8"],), 360),
    Part("engine", "attention's roofline, 1 B, the engine with and without a step in flight", ([*GPU, "attention,small,engine"],), 240),
    Part("suite", "mlsys bench gpu --suite full", (
        [*BENCH, "--model", "tinyllama-1.1b", "--precision", "bf16,int8", "--max-batch", "32", "--max-step-tokens", "2048",
         "--max-context", "2048", "--budget", "180s", "-o", "{out}/bench-full.json"],
    ), 260),
    Part("matrices", "every matrix of the 8 B shape in every way, for ways.py", ([*GPU, "matrices"],), 480, is_asked_for=True),
)  # fmt: skip


def main() -> int:
    """Do the parts that are not done; return how many did not hold, those that are left not counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help="names, separated by commas; done again where they are done")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no part that would take longer than this in all")
    parser.add_argument("--out", type=Path, help="folder, by default reports/evidence/DATE-GPU")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    asked = parser.parse_args()
    parts = chosen(asked.parts)
    if asked.list:
        for part in PARTS:
            print(f"{part.name:20} about {part.expected_s / 60:.0f} min  {part.about}")
        return 0
    if not torch.cuda.is_available():
        print(f"no CUDA device on this machine (torch {torch.__version__}): nothing is measured, and nothing is proven")
        return 0
    out = (asked.out or ROOT / "reports" / "evidence" / folder_name()).resolve()
    out.mkdir(parents=True, exist_ok=True)
    return run_all(parts, out, asked.minutes * 60, again=asked.parts is not None)


def chosen(names: str | None) -> tuple[Part, ...]:
    """Return the parts of these names, all of them for None."""
    if names is None:
        return tuple(part for part in PARTS if not part.is_asked_for)
    by_name = {part.name: part for part in PARTS}
    unknown = [name for name in names.split(",") if name not in by_name]
    if unknown:
        raise SystemExit(f"part {unknown[0]!r}: there are {', '.join(by_name)}")
    return tuple(by_name[name] for name in names.split(","))


def folder_name() -> str:
    """Return a name of today and this GPU."""
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"{datetime.datetime.now(datetime.UTC).date().isoformat()}-{gpu}"


def run_all(parts: tuple[Part, ...], out: Path, budget_s: float, *, again: bool) -> int:
    """Run what is to be run and fits, and keep what came of it in parts.json."""
    began, kept = time.monotonic(), out / "parts.json"
    done: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.exists() else {}
    for part in parts:
        if part.name in done and not again:
            continue
        left_s = budget_s - (time.monotonic() - began)
        if left_s < part.expected_s:
            print(f"left for the next time: {part.name}, of about {part.expected_s / 60:.0f} minutes")
            continue
        done[part.name] = run(part, out, min(LIMIT_S, left_s))
        kept.write_text(json.dumps(done, indent=1) + "\n")
    missing = [part.name for part in parts if part.name not in done]
    failed = [name for name, what in done.items() if what["status"]]
    print(f"{len(done)} parts done in {out}; did not hold: {', '.join(failed) or 'none'}; left: {', '.join(missing) or 'none'}")
    return len(failed)


def run(part: Part, out: Path, limit_s: float) -> dict[str, float]:
    """Run a part's commands, their output shown and kept; one that takes too long is ended, and what it has written stays."""
    print(f"\n=== {part.name}: {part.about}", flush=True)
    began, status = time.monotonic(), 0
    with (out / f"{part.name}.log").open("w", encoding="utf-8") as log:
        for command in part.commands:
            filled = [sys.executable, "-u", *(word.replace("{out}", str(out)) for word in command)]
            status |= watched(filled, log, max(1.0, limit_s - (time.monotonic() - began)))
    seconds = round(time.monotonic() - began, 1)
    print(f"=== {part.name}: {'held' if status == 0 else f'status {status}'}, {seconds:.0f} s", flush=True)
    return {"status": status, "seconds": seconds}


def watched(command: list[str], log: TextIO, limit_s: float) -> int:
    """Show and keep what a process prints, and end it and its children at its limit; return its status, 124 if it was ended."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert process.stdout is not None
    late = threading.Event()

    def end() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, end)
    timer.start()
    for line in process.stdout:
        print(line, end="", flush=True)
        print(line, end="", file=log, flush=True)
    status = process.wait()
    process.stdout.close()
    timer.cancel()
    return 124 if late.is_set() else abs(status)


if __name__ == "__main__":
    sys.exit(main())
