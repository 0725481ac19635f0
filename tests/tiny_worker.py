"""A bench worker of a project that is not ours, in the standard library alone: what `gate run --worker` asks of any program.

What it measures is written in said.json beside it, so that a commit of a scratch repository can be faster, slower, or broken.
"""

import json
import math
import os
import random
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
said = json.loads((here / "said.json").read_text())
launches = Path(said["log"]) if "log" in said else None
launch = 0
if launches is not None:
    with launches.open("a") as log:
        log.write(f"{os.getpid()}\n")
    launch = len(launches.read_text().splitlines())
sys.stderr.write("tiny worker at work\n")


def tell(**message: object) -> None:
    """Write one line of the conversation."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


hard = {"cpu": said.get("cpu", "one")}
tell(
    hello="tiny",
    protocol=said.get("protocol", 1),
    benchmark="tiny",
    sources=said.get("sources", str(here)),
    machine={"hard": hard, "soft": {}},
)
draw = random.Random(f"{said['seconds']} {launch} {os.getpid() if launches is None else ''}")
launch_s = said["seconds"] * math.exp(draw.gauss(0, said.get("sd", 0.004)))
for line in sys.stdin:
    number = int(line.split()[1])
    if launch >= said.get("dies_in_launch", math.inf) and number == 3:
        sys.exit("out of luck")
    if said.get("silent"):
        tell(turn=number, samples=[])
        continue
    values = [launch_s * (1 + draw.random() / 100) for _ in range(5)]
    time = {"name": "tiny.work", "unit": "s", "better": "lower", "parameters": {}, "values": values, "involuntary": [0] * 5}
    calls = {
        "name": "tiny.calls",
        "unit": "calls",
        "better": "lower",
        "parameters": {},
        "deterministic": True,
        "values": [said.get("calls", 100)],
    }
    extra = [{**calls, "name": name} for name in said.get("more", [])]
    tell(turn=number, samples=[time, *([calls, *extra] if number == 1 else [])])
