"""The engine behind an OpenAI-compatible HTTP server.

    run(options)             serve in this process until a signal comes (and start the engine's own process)
    start(options)           serve in a child process, as a context manager with `.url`: for programs

Two processes, because a busy torch loop starves an event loop: the HTTP process (`server`, `app`, `link`), which imports no torch, and
the engine process (`core`).  Between them run the frames of `wire`.
"""

from __future__ import annotations

from mlsys_bench.serve.options import Options
from mlsys_bench.serve.process import ServerProcess, start

__all__ = ["Options", "ServerProcess", "run", "start"]


def run(options: Options) -> None:
    """Serve until SIGINT or SIGTERM."""
    from mlsys_bench.serve import server  # Starlette and uvicorn are imported only by who serves

    server.run(options)
