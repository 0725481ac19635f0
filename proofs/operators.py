"""Fit the time of single matrix products to a roofline: where the assumed `memory`, `compute16` and `ROOF_NORM` come from.

    seconds = launch + ((memory bytes / bandwidth)^p + (compute FLOPs / peak)^p)^(1/p)

over the linear operators of four Llama models in Vidur's tables, up to 2,048 tokens, sizes counted evenly; bytes are those of the weights.
Only A100 and A40 speak: H100 is printed to show that the same p fits it, and is used nowhere, so that it can be left out honestly.
"""

from __future__ import annotations

import sys
from pathlib import Path

import _one_thread  # noqa: F401
import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from mlsys_bench import hardware

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "llm" / "vidur_linear_ops.parquet"
DEVICES = {"a100": "A100-80GB-SXM", "a40": "A40", "h100": "H100-SXM"}
MOST_TOKENS = 2048
START = (3e-6, 1.2, 1.3, 2.0)  # launch, memory, compute, p

Array = npt.NDArray[np.float64]


def main() -> int:
    """Print the fit of each device."""
    if not DATA.exists():
        print(f"{DATA} is not beside this checkout: nothing to fit")
        return 0
    columns = table()
    for short, name in DEVICES.items():
        launch_s, memory, compute, norm, error = fitted(*times(columns, short, hardware.find(name)))
        print(f"{name:14} launch {1e6 * launch_s:.1f} us, memory {memory:.3f}, compute {compute:.3f}, p {norm:.2f}, mean error {error:.1%}")
    return 0


def table() -> dict[str, npt.NDArray[np.generic]]:
    """Return the table by column."""
    import pyarrow.parquet

    found = pyarrow.parquet.read_table(DATA).to_pydict()
    return {name: np.array(values) for name, values in found.items()}


def times(columns: dict[str, npt.NDArray[np.generic]], short: str, device: hardware.Device) -> tuple[Array, Array, Array, Array]:
    """Return of every product its measured time, its times at full bandwidth and at full peak, and its tokens."""
    at = (columns["device"] == short) & (columns["num_tokens"].astype(float) <= MOST_TOKENS)
    heads, kv_heads, hidden, inner, devices, tokens = (
        columns[name][at].astype(float)
        for name in ("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "num_tensor_parallel_workers", "num_tokens")
    )
    params = {
        "attn_pre_proj_ms": hidden * (hidden + 2 * kv_heads * hidden / heads),
        "attn_post_proj_ms": hidden * hidden,
        "mlp_up_proj_ms": 2 * hidden * inner,
        "mlp_down_proj_ms": hidden * inner,
    }
    measured = np.concatenate([columns[name][at].astype(float) / 1000 for name in params])
    moved = np.concatenate([2 * p / devices / device.bandwidth_bytes_per_s for p in params.values()])
    computed = np.concatenate([2 * p / devices * tokens / device.flops_per_s["bf16"] for p in params.values()])
    return measured, moved, computed, np.tile(tokens, len(params))


def fitted(measured: Array, moved: Array, computed: Array, tokens: Array) -> tuple[float, float, float, float, float]:
    """Return launch in seconds, memory, compute, p, and the mean error, each octave of tokens weighing the same."""
    octave = np.log2(tokens).astype(int)
    weight = 1 / np.sqrt(np.bincount(octave)[octave])

    def misfit(x: Array) -> Array:
        launch_s, memory, compute, p = np.exp(x)
        return np.asarray(np.log((launch_s + ((memory * moved) ** p + (compute * computed) ** p) ** (1 / p)) / measured))

    def weighted(x: Array) -> Array:
        return np.asarray(misfit(x) * weight / weight.mean())

    solved = least_squares(weighted, np.log(START), loss="soft_l1", f_scale=0.1)
    found = np.exp(solved.x).tolist()
    return (*found, float(np.average(np.abs(misfit(solved.x)), weights=weight**2)))


if __name__ == "__main__":
    sys.exit(main())
