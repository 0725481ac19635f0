"""Money: APIs against own fleets, caches, routing, distillation, at the dated prices of the catalogue."""

from __future__ import annotations

from mlsys_bench import pricing
from mlsys_bench.claims import Claim
from mlsys_bench.types import Provenance
from mlsys_bench.units import show_usd

PER_DAY = 1e6
QUOTED_MONTH_USD = 30_000.0  # of the fleet that people quote
LONG_PROMPT, SHARED, ANSWER = 2100.0, 2000.0, 300.0


def _gpt4_day() -> Claim:
    mixed = [PER_DAY * _ask("gpt-4", 1000 - out, out) for out in (250, 500)]
    both = PER_DAY * _ask("gpt-4", 1000, 1000)
    return Claim(
        key="gpt4-90k-a-day",
        topic="money",
        claim="GPT-4 for a million requests of 1,000 tokens a day costs $90,000",
        quoted="$90,000",
        recomputed=f"{show_usd(mixed[0])} (750 in, 250 out) to {show_usd(mixed[1])} (500 and 500)",
        value=mixed[1],
        unit="$/day",
        low=mixed[0],
        high=mixed[1],
        verdict="wrong",
        because=f"it charges the same 1,000 tokens once as input and once as output: that is 2,000 tokens, {show_usd(both)}",
        formula="requests x (in x price in + out x price out)",
        provenance=_provenance("gpt-4"),
    )


def _self_hosted_request() -> Claim:
    per_request = QUOTED_MONTH_USD / (100 * 86_400 * 30)
    return Claim(
        key="self-hosted-0.003",
        topic="money",
        claim="A fleet of $30,000 a month at 100 requests/s costs $0.003 a request",
        quoted="$0.003",
        recomputed=f"${per_request:.6f}, {0.003 / per_request:.0f} times less",
        value=per_request,
        unit="$",
        verdict="wrong",
        because=f"$0.003 is the price at {per_request / 0.003:.1%} of that traffic",
        formula="dollars a month / (100/s x 86,400 s x 30)",
        provenance=Provenance.ASSUMED,
    )


def _break_even_quoted() -> Claim:
    """Set $30,000 a month against what a request costs at each API, 1,000 tokens in and 1,000 out, or 750 and 250."""
    usd_per_h = QUOTED_MONTH_USD / 30 / 24
    at = {label: _even(usd_per_h, _ask(model, i, o)) for label, model, i, o in _CASES}
    text = ", ".join(f"{rate:,.0f} ({label})" for label, rate in at.items())
    return Claim(
        key="break-even-10k",
        topic="money",
        claim="An own fleet breaks even at about 10,000 requests a day",
        quoted="10,000/day",
        recomputed=text,
        value=next(iter(at.values())),
        unit="1/day",
        low=min(at.values()),
        high=max(at.values()),
        verdict="holds only if",
        because="the API is GPT-4 of 2023 at 1,000 tokens each way; prices fell, the break-even rose with them",
        formula="$30,000 / 30 days / dollars per request at the API",
        provenance=_provenance("gpt-4", "gpt-4o", "gpt-4o-mini"),
    )


def _eight_h100_month() -> Claim:
    """List every published price of eight H100 for a month of 730 hours."""
    asked = {
        f"{o.provider}{' spot' if o.term == 'spot' else ''}": o
        for o in pricing.offers("H100-SXM")
        if o.devices == 8 and o.term != "reserved"
    }
    months = {name: pricing.usd_per_month(o.usd_per_h) for name, o in asked.items()}
    text = ", ".join(f"{name} {show_usd(usd)}" for name, usd in sorted(months.items(), key=lambda m: -m[1]))
    return Claim(
        key="8xh100-30k-month",
        topic="money",
        claim="Eight H100 cost $30,000 a month",
        quoted="$30,000",
        recomputed=text,
        value=min(months.values()),
        unit="$/month",
        low=min(months.values()),
        high=max(months.values()),
        verdict="holds only if",
        because="you name the provider and the term: the same eight cost 5 times as much at one as at another's spot",
        formula="dollars an hour x 730",
        provenance=Provenance.weakest(*(o.provenance for o in asked.values())),
    )


def _prefix_tokens() -> Claim:
    two, many = SHARED / (2 * 2125), SHARED / 2125
    return Claim(
        key="prefix-47-percent",
        topic="money",
        claim="Prefix caching saves 47 % of the prompt",
        quoted="47 %",
        recomputed=f"{two:.0%} for 2 requests, {1000 * SHARED / (1001 * 2125):.0%} for 1,001, at most {many:.0%}",
        value=two,
        unit="share",
        low=two,
        high=many,
        verdict="holds only if",
        because="there are exactly two requests: the first pays, so n requests save (n - 1) / n of what they share",
        formula="2,000 shared of 2,125 prompt tokens: (n - 1) / n x 2,000 / 2,125",
        provenance=Provenance.ASSUMED,
    )


def _prefix_money() -> Claim:
    """Price the saving: cached tokens are cheaper, not free, and answers cost what they cost."""
    saved = {m: _saved(m, ANSWER) for m in ("gpt-4o", "gpt-4.1", "gpt-5", "claude-sonnet-4-5")}
    long = [_saved(m, 1000.0) for m in saved]
    text = ", ".join(f"{model} {share:.0%}" for model, share in saved.items())
    return Claim(
        key="prefix-saves-money",
        topic="money",
        claim="So prefix caching halves the bill",
        quoted="50 %",
        recomputed=f"{text}; with 1,000 tokens out {min(long):.0%} to {max(long):.0%}",
        value=saved["gpt-4o"],
        unit="share",
        low=min(long),
        high=max(saved.values()),
        verdict="holds only if",
        because="cached input is a tenth of the price, the shared prefix is nearly the whole prompt, and answers are short",
        formula="1 - price with 2,000 of 2,100 tokens cached / price without, 300 tokens out",
        provenance=_provenance(*saved),
    )


def _routing() -> Claim:
    """Send 70 % of the traffic to a model that costs a share r: f (1 - r) is saved; a cascade asks the small one first, always."""
    ratios = (0.05, 0.1, 0.2, 0.3)
    routed, cascaded = [0.7 * (1 - r) for r in ratios], [1 - (r + 0.3) for r in ratios]
    mini = _ask("gpt-4o-mini", 1000, 300) / _ask("gpt-4o", 1000, 300)
    return Claim(
        key="routing-60-80",
        topic="money",
        claim="Routing 70 % of the traffic to a small model saves 60 to 80 %",
        quoted="60-80 %",
        recomputed=(
            f"{routed[-1]:.0%} to {routed[0]:.1%} routed, {cascaded[-1]:.0%} to {cascaded[0]:.0%} as a cascade, "
            "for a small model at 30 to 5 % of the price"
        ),
        value=0.7 * (1 - mini),
        unit="share",
        low=cascaded[-1],
        high=0.7,
        verdict="holds only if",
        because=(
            f"the small model costs at most a seventh (gpt-4o-mini: {mini:.0%} of gpt-4o, {0.7 * (1 - mini):.0%} saved); "
            "more than the 70 % that is routed cannot be saved"
        ),
        formula="routed f (1 - r); cascade 1 - (r + 1 - f)",
        provenance=_provenance("gpt-4o", "gpt-4o-mini"),
    )


def _distillation() -> Claim:
    text = [1 - 1 / times for times in (10, 50)]
    table = [1 / (1 - share) for share in (0.8, 0.95)]
    return Claim(
        key="distillation-10-50x",
        topic="money",
        claim="Distillation is 10 to 50 times cheaper, which saves 80 to 95 %",
        quoted="10-50x",
        recomputed=f"10 to 50 times is {text[0]:.0%} to {text[1]:.0%}; 80 to 95 % is {table[0]:.0f} to {table[1]:.0f} times",
        value=table[1],
        unit="x",
        low=table[0],
        high=table[1],
        verdict="wrong",
        because="the two halves of the sentence contradict each other: they share 10 to 20 times alone",
        formula="saved = 1 - 1 / times",
        provenance=Provenance.ASSUMED,
    )


# ---------------------------------------------------------------- arithmetic

_CASES = (
    ("gpt-4, 1,000 + 1,000", "gpt-4", 1000, 1000),
    ("gpt-4, 750 + 250", "gpt-4", 750, 250),
    ("gpt-4o", "gpt-4o", 1000, 1000),
    ("gpt-4o-mini", "gpt-4o-mini", 1000, 1000),
)


def _ask(model: str, input_tokens: float, output_tokens: float, cached_tokens: float = 0.0) -> float:
    return pricing.api_usd_per_request(pricing.api_price(model), input_tokens, output_tokens, cached_tokens=cached_tokens)


def _even(usd_per_h: float, api_usd: float) -> float:
    """Return the rate of break-even of a fleet that carries any: what the claim supposes."""
    found = pricing.break_even(api_usd, 1e9, lambda n: usd_per_h * n).from_per_day
    assert found is not None
    return found


def _saved(model: str, output_tokens: float) -> float:
    return 1 - _ask(model, LONG_PROMPT, output_tokens, SHARED) / _ask(model, LONG_PROMPT, output_tokens)


def _provenance(*models: str) -> Provenance:
    """Return how far published prices may be believed: those of a model that is no longer sold are history."""
    prices = [pricing.api_price(model) for model in models]
    return Provenance.ASSUMED if any(p.withdrawn and p.withdrawn <= p.date[-10:] for p in prices) else Provenance.MEASURED


CLAIMS = {
    "gpt4-90k-a-day": _gpt4_day,
    "self-hosted-0.003": _self_hosted_request,
    "break-even-10k": _break_even_quoted,
    "8xh100-30k-month": _eight_h100_month,
    "prefix-47-percent": _prefix_tokens,
    "prefix-saves-money": _prefix_money,
    "routing-60-80": _routing,
    "distillation-10-50x": _distillation,
}
