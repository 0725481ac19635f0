"""Designs confirmed before anybody asks for them, where there are workers to do it: the answers are those of one at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from mlsys_bench import workers
from mlsys_bench.errors import MlsysError
from mlsys_bench.plan import confirm
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.sizing import Design
from mlsys_bench.plan.trial import Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judged:
    """What simulation makes of a design.  An error waits until the design is asked for: it may never be."""

    found: tuple[Design, Trial] | None = None
    error: MlsysError | None = None


class Ahead:
    """What simulation makes of designs; with an executor also of the next few that may be asked for, while it is at it."""

    def __init__(self, request: Request, designs: Sequence[Design], executor: Executor | None) -> None:
        self._request, self._designs, self._executor = request, designs, executor
        self._known: dict[int, _Judged] = {}

    def confirmed(self, at: int, more: int, likely: Callable[[Design], bool]) -> tuple[Design, Trial] | None:
        """Return one design confirmed, None where it cannot be; `more` others at most, the likely ones, are done beside it."""
        if at not in self._known:
            wanted = [at]
            if self._executor is not None:
                wanted += [i for i in range(at + 1, len(self._designs)) if i not in self._known and likely(self._designs[i])][:more]
            asked = [self._designs[i] for i in wanted]
            found = workers.each(_judged, asked, shared=self._request, executor=self._executor)
            self._known |= dict(zip(wanted, found, strict=True))
        judged = self._known[at]
        if judged.error is not None:
            raise judged.error
        return judged.found


def _judged(request: Request, design: Design) -> _Judged:
    try:
        return _Judged(found=confirm.confirm(design, request))
    except MlsysError as error:
        return _Judged(error=error)
