"""What a person says about what requests carry, beyond the laws of their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlsys_bench import units
from mlsys_bench.errors import BadInput
from mlsys_bench.types import Tenant

if TYPE_CHECKING:
    from mlsys_bench.loadtest.payloads.dataset import DataSet
    from mlsys_bench.workload import Schedule, Sessions

_PREFIX_FORM = "TOKENS[:GROUPS[:SHARE]], e.g. 1000, or 1000:4:80% for four prefixes that 80 % of the requests have"
_TENANT_FORM = "NAME[:PRIORITY]=SHARE@PROMPT/OUTPUT, e.g. chat:1=70%@lognormal:300:1/200; priority 1 goes before 2"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """So many tokens that a share of the prompts begin with, the same in each of some groups (system prompts, say)."""

    tokens: int
    groups: int = 1
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """What images requests carry: these data URLs in turn, or made-up ones of so many pixels."""

    urls: tuple[str, ...] = ()
    pixels: tuple[int, int] | None = None
    each: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What requests carry.  What is left out is made-up text of the lengths that were drawn, no two prompts alike."""

    pairs: Schedule | None = None  # prompt and answer lengths go together as in these requests
    shared_prefix: SharedPrefix | None = None
    sessions: Sessions | None = None  # turns that wait for the answer before and carry it
    dataset: DataSet | None = None
    dataset_lengths: bool = True  # answers are as long as its rows say, where they do
    images: Images | None = None
    tenants: tuple[Tenant, ...] = ()
    same_words: bool = False  # the very words of every run with this seed; else words that no run before had, as a cache would tell


def parse_shared_prefix(text: str) -> SharedPrefix:
    """Return what '1000', '1000:4' or '1000:4:80%' says: tokens, groups, share of the requests.  Raises BadInput."""
    where = f"--shared-prefix {text}"
    tokens, *rest = text.split(":")
    if len(rest) > 2:
        raise BadInput(f"{where}: write {_PREFIX_FORM}")
    share = units.fraction(rest[1], where) if len(rest) == 2 else 1.0
    if not 0 < share <= 1:
        raise BadInput(f"{where}: a share of the requests lies above 0% and up to 100%")
    return SharedPrefix(tokens=_whole(tokens, where), groups=_whole(rest[0], where) if rest else 1, share=share)


def parse_tenants(texts: Sequence[str]) -> tuple[Tenant, ...]:
    """Return the tenants of e.g. 'chat=70%@lognormal:300:1/200' and 'batch:2=30%@4000/50', of priority 1 and 2.  Raises BadInput."""
    tenants = tuple(_tenant(text) for text in texts)
    names = [tenant.name for tenant in tenants]
    if len(set(names)) < len(names):
        raise BadInput(f"--tenant: {', '.join(names)}: every tenant needs a name of its own")
    return tenants


def _tenant(text: str) -> Tenant:
    from mlsys_bench import workload

    who, is_given, rest = text.partition("=")
    name, ranked, priority = who.partition(":")
    share, at, lengths = rest.partition("@")
    prompt, slash, output = lengths.partition("/")
    if not (name.strip() and is_given and at and slash):
        raise BadInput(f"--tenant {text}: write {_TENANT_FORM}")
    return Tenant(
        name=name.strip(),
        priority=_priority(priority, text) if ranked else 1,
        share=units.fraction(share, f"--tenant {text}"),
        prompt_tokens=workload.parse_lengths(prompt),
        output_tokens=workload.parse_lengths(output),
    )


def _priority(text: str, where: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise BadInput(f"--tenant {where}: {text!r} is no priority; a whole number from 1, which goes first")
    return int(text)


def _whole(text: str, where: str) -> int:
    if not text.isdecimal() or not int(text):
        raise BadInput(f"{where}: {text!r} is no whole number above zero; write {_PREFIX_FORM}")
    return int(text)
