"""Which models are published with truncated sampling: engines that honour `generation_config.json` then sort the vocabulary each step.

vLLM takes its default sampling from that file since 0.8 (vllm-project/vllm pull requests 12622 and 15281).  `data/sampling.csv` says of
each row whether the file, or a copy of it, was read, or is only remembered.
"""

from __future__ import annotations

import csv
import functools

from mlsys_bench import resources


@functools.cache
def _rows() -> dict[str, bool]:
    with resources.catalogue("sampling.csv").open(newline="", encoding="utf-8") as file:
        return {row["id"]: row["truncates"] == "True" for row in csv.DictReader(file)}


def truncates(model: str) -> bool | None:
    """Return whether a catalogue model's default sampling has a top-p below 1 or a top-k; None where nobody looked."""
    return _rows().get(model)
