"""A bench record as a reader wants it: medians with intervals, what was achieved of this machine's ceilings, and what binds.

catalogue.py  every benchmark in a line, by group, with its unit
roofs.py      ceilings: measured in the record, and those of the data sheet
rows.py       `table`: a row per measurement
flat.py       the same as a flat table for CSV

It stands below the words (`report/`), so that a record read from a file says as much as one just measured.
"""

from __future__ import annotations

from mlsys_bench.readings.catalogue import CATALOGUE, GROUPS, Entry, group_of
from mlsys_bench.readings.flat import write_csv
from mlsys_bench.readings.roofs import Roofs, datasheet, measured
from mlsys_bench.readings.rows import Row, table

__all__ = ["CATALOGUE", "GROUPS", "Entry", "Roofs", "Row", "datasheet", "group_of", "measured", "table", "write_csv"]
