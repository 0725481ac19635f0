"""`python -m mlsys_bench.serve '{"model": "nano", "port": 8000}'`: the same as `mlsys serve`, with `Options` as JSON."""

from __future__ import annotations

import sys

from mlsys_bench.serve import server

if __name__ == "__main__":
    sys.exit(server.main(sys.argv[1:]))
