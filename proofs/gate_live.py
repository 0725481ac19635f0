"""The gate on this machine, live: extra work planted in the engine's decode step is found, the same program passes, within 90 s each.

A throw-away repository holds this checkout, and commits in which the benchmark's iteration is a decode step and so many small matrix
products: the wrapper is theirs alone.  How many are 6 % and 10 % of a step is measured before, in processes of their own.
`python proofs/gate_live.py [--repeat N]`
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = "mlsys_bench/bench/gated.py"
TOLERANCE, BUDGET_S = 0.03, 90.0
PLANTED = {"same": 0.0, "6": 0.06, "10": 0.10}
WANTED = {"same": ("pass", "improved"), "6": ("regression",), "10": ("regression",)}
WRAPPER = '''

def _planted(step: Any, times: int) -> Any:
    """Return a step with so many matrix products behind it."""
    square = torch.ones(32, 32)

    def work() -> None:
        step()
        for _ in range(times):
            torch.mm(square, square)

    return work
'''
CALIBRATE = """
import json, statistics, time, torch
from mlsys_bench.bench import gated, turns
ours = gated.decode()
turns.Turns(ours).take(1)
square = torch.ones(32, 32)
steps, products = [], []
for _ in range(100):  # by turns, in CPU time: a neighbour slows both
    start = time.thread_time()
    ours.work()
    middle = time.thread_time()
    for _ in range(100):
        torch.mm(square, square)
    steps.append(middle - start)
    products.append((time.thread_time() - middle) / 100)
print(json.dumps([statistics.median(steps), statistics.median(products)]))
"""


def main() -> int:
    """Print each figure beside its bar; return 1 when one is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=1)
    return 1 if run(parser.parse_args().repeat) else 0


def run(repeat: int = 1) -> int:
    """Print each figure beside its bar; return how many are missed."""
    step_s, unit_s = calibrated()
    times = {name: round(share * step_s / unit_s) for name, share in PLANTED.items()}
    print(f"a decode step takes {1e3 * step_s:.3f} ms, a small product {1e6 * unit_s:.2f} us: {times}")
    missed = 0
    with tempfile.TemporaryDirectory(prefix="gate-live-") as name:
        repository = Path(name) / "project"
        copied(repository)
        for tag, count in times.items():
            committed(repository, tag, count)
        for _ in range(repeat):
            for tag in times:
                missed += not shown(repository, tag, Path(name) / f"{tag}.json")
    return missed


def calibrated() -> tuple[float, float]:
    """Return what a decode step and a small matrix product take, medians of three processes."""
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", CALIBRATE], capture_output=True, text=True, check=True, env=environment())
        runs.append(json.loads(done.stdout))
    step_s, unit_s = (statistics.median(column) for column in zip(*runs, strict=True))
    return step_s, unit_s


def environment() -> dict[str, str]:
    """Return one thread, and somebody who commits."""
    who = {
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "proof"), ("EMAIL", "proof@example.org"))
    }
    return os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | who


def git(folder: Path, *arguments: str) -> str:
    """Return what git says."""
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, env=environment()).stdout


def copied(repository: Path) -> None:
    """Make a repository of the checkout as it is now, and commit it as `base`."""
    for name in git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, repository / name)
    git(repository, "init", "-q", "-b", "main")
    committed(repository, "base", None)


def committed(repository: Path, tag: str, times: int | None) -> None:
    """Commit the checkout with so many products behind a step; none of it all for None."""
    path = repository / PLACE
    text = (ROOT / PLACE).read_text()
    if times is not None:
        before = "work=engine.step,"
        assert text.count(before) == 1
        text = (text.replace(before, f"work=_planted(engine.step, {times}),") + WRAPPER) if times else text + "\n# nothing else\n"
    path.write_text(text)
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", tag)
    git(repository, "tag", tag)


def shown(repository: Path, tag: str, out: Path) -> bool:
    """Gate a commit against the base, print what was found, and say whether it should have been."""
    start_s = time.monotonic()
    command = [
        sys.executable, "-m", "mlsys_cli", "gate", "run", "--base", "base", "--cand", tag, "--bench", "engine.decode",
        "--tolerance", f"{100 * TOLERANCE:g}%", "--budget", f"{BUDGET_S:g}s", "-o", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, env=environment())
    took_s = time.monotonic() - start_s
    if not out.is_file():
        print(f"MISSED  {tag}: exit {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1]}")
        return False
    found = json.loads(out.read_text())
    verdict = found["verdict"]["verdict"]
    kept = verdict in WANTED[tag] and took_s <= BUDGET_S
    pairs = len(found["base_bench"]["measurements"][0]["launches"])
    print(
        f"{'ok' if kept else 'MISSED':6}  +{100 * PLANTED[tag]:.0f} %: {verdict} (wanted {' or '.join(WANTED[tag])}) in {took_s:.0f} s "
        f"(bar {BUDGET_S:.0f} s), {pairs} pairs, ended by {found['ended']}, {found['contention']['verdict']}"
    )
    for f in found["verdict"]["findings"]:
        if f["ratio"] is not None and f["kind"] != "counter":
            low, high = f["interval"] or (f["ratio"], f["ratio"])
            sd = "" if f["launch_sd"] is None else f"launch sd {100 * f['launch_sd']:.2f} %"
            print(f"          {f['name']:28} {f['ratio']:.4f} ({low:.4f} to {high:.4f}) {f['verdict']:12} {sd}")
    out.unlink()
    return kept


if __name__ == "__main__":
    sys.exit(main())
