"""The engine on one GPU: Triton kernels, matrices in every precision, paged KV, and a whole decode step as one CUDA graph.

    tri.py                Triton, where it is installed
    kernels_linear.py     y = x W^T for few rows: norm before, SwiGLU or residual after, in the same kernel
    kernels_attention.py  attention over paged KV: one query per sequence (split over keys), or chunks of prompts
    kernels_small.py      norm, rope + KV write, SwiGLU, embedding with token feedback, the choice of tokens
    linears.py            matrices in every format;  ways.py  which kernel, in which tiles, for how many rows
    attention.py          attention, launched;  small.py  norms and choices, launched
    kv.py                 the cache: fp32, bf16, or int8 and fp8 with a scale per token and head
    model.py              the decoder;  graphs.py  its decode steps, captured

Nothing outside imports it unless a GPU is asked for, so that the CPU engine never loads Triton.
"""

from __future__ import annotations
