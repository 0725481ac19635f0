"""Kernels in C, compiled on first use with the system's compiler: linears, the thread pool and the step of a decoder.

`csrc` is the source; `csrc/linear.h` says how weights lie.  `build` compiles it once per source, compiler and processor, `library` loads
it once; `linears` packs matrices for it; `model` is a decoder whose every step is one call (`csrc/step.h`).
"""
