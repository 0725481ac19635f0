"""Kernels in C, compiled on first use with the system's compiler: linears, the thread pool and the step of a decoder.

    csrc/       the source;  linear.h says how weights lie
    build.py    compiles it once per source, compiler and processor;  library.py  loads it, once
    linears.py  matrices packed for it;  model.py  a decoder whose every step is one call (step.h)
"""
