"""`python -m mlsys_cli`."""

from mlsys_cli.main import run

run()
