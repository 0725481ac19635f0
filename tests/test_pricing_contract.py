"""A user's own prices: read whole or refused with file and key, and merged over the published ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlsys_bench import hardware, pricing
from mlsys_bench.errors import BadInput
from mlsys_bench.pricing import contract
from mlsys_bench.types import Provenance

TODAY = "2026-11-21"
HEAD = "mlsys: 1\nkind: prices\nsource: contract 4711\ndate: 2026-10-01\ncatalogue: {catalogue}\n"
FULL = (
    HEAD.format(catalogue="merge")
    + """
offers:
  - {provider: aws, instance: p5.48xlarge, device: h100, devices: 8, region: us-west-2, on_demand: $40.00/h, spot: $15.00/h}
  - {provider: colo, instance: rack, device: MI300X, devices: 8, region: berlin, on_demand: $8760/month}
commitments:
  - {provider: aws, instance: p5.48xlarge, device: H100-SXM, devices: 8, region: us-west-2, price: $24.00/h, term: 1y, upfront: 50%,
     committed: 4, at_most: 10}
discounts:
  - {less: 10%, provider: nebius}
  - {less: 20%, device: H100-SXM, term: on-demand, provider: nebius}
quotas:
  - {device: H100-SXM, devices: 96, provider: aws, region: us-west-2}
rates: {storage: $0.10/GB/month, egress: $0.09/GB, vcpu: $0.03/h}
"""
)


def read(text: str, today: str = TODAY) -> pricing.Market:
    return contract.parse(text, "prices.yaml", lambda name: hardware.find(name).id, today)


def by_instance(market: pricing.Market, instance: str, term: str) -> list[float]:
    return [o.usd_per_h for o in market.of(term=term) if o.instance == instance and o.source != "published"]


def test_an_own_price_replaces_the_published_one_and_the_others_stay() -> None:
    market = read(FULL)
    west = [o for o in market.of("H100-SXM", "on-demand") if (o.instance, o.region) == ("p5.48xlarge", "us-west-2")]
    assert [(o.usd_per_h, o.source, o.date) for o in west] == [(40.0, "contract 4711", "2026-10-01")]
    assert len(market.of("L4")) == len(pricing.offers("L4"))
    assert [o.usd_per_h for o in market.of("MI300X")] == [12.0]  # $8,760 a month of 730 hours


def test_replace_leaves_no_published_offer() -> None:
    market = read(FULL.replace("merge", "replace"))
    assert {o.provider for o in market.offers} == {"aws", "colo"}
    assert market.of("L4") == ()


def test_discounts_multiply_and_say_so() -> None:
    """Nebius' H100 at $2.95: 10 % off everything, 20 % off H100 on demand: 2.95 x 0.9 x 0.8 = $2.124; its spot 1.25 x 0.9 = $1.125."""
    market = read(FULL)
    on_demand = next(o for o in market.of("H100-SXM", "on-demand") if o.instance == "gpu-h100-sxm_1gpu")
    spot = next(o for o in market.of("H100-SXM", "spot") if o.instance == "gpu-h100-sxm_1gpu")
    assert (on_demand.usd_per_h, spot.usd_per_h) == pytest.approx((2.124, 1.125))
    assert on_demand.source.endswith("less 0.28 by contract")


def test_a_commitment_is_paid_half_at_its_start() -> None:
    """Four instances at $24.00 for a year, half upfront: 0.5 x 24 x 8,760 x 4 = $420,480."""
    market = read(FULL)
    (offer, held), *others = market.reservations.items()
    assert not others
    assert (held.term_months, held.committed, held.at_most, held.upfront_share) == (12, 4, 10, 0.5)
    assert held.upfront_usd(offer, 4) == pytest.approx(420_480.00)
    assert market.committed(offer) == 4


def test_the_tighter_of_quota_and_bound_holds() -> None:
    """96 devices are twelve instances of eight; the commitment allows ten."""
    market = read(FULL)
    reserved = next(iter(market.reservations))
    on_demand = next(o for o in market.of("H100-SXM", "on-demand") if (o.instance, o.region) == ("p5.48xlarge", "us-west-2"))
    assert (market.most(reserved), market.most(on_demand)) == (10, 12)
    assert market.most(market.of("L4")[0]) is None


def test_other_rates_are_in_si() -> None:
    rates = read(FULL).rates
    assert (rates.storage_usd_per_byte_month, rates.egress_usd_per_byte, rates.vcpu_usd_per_h) == pytest.approx((1e-10, 9e-11, 0.03))


def test_prices_older_than_eighteen_months_are_flagged() -> None:
    fresh, stale = read(FULL, "2028-04-30"), read(FULL, "2028-05-01")
    assert (fresh.notes, {o.provenance for o in fresh.of("MI300X")}) == ((), {Provenance.MEASURED})
    assert {o.provenance for o in stale.of("MI300X")} == {Provenance.ASSUMED}
    assert stale.notes == ("prices.yaml: its prices are of 2026-10-01, more than 18 months old",)


OFFER = "{provider: a, instance: b, device: L4, devices: 1, region: r, on_demand: $1/h}"
WRONG = [
    (FULL.replace("quotas:", "quota:"), "prices.yaml: unknown key quota; did you mean quotas?"),
    (FULL.replace("$40.00/h", "40"), "prices.yaml: offers[0].on_demand: 40 has no unit"),
    (FULL.replace("$40.00/h", "$40.00"), "prices.yaml: offers[0].on_demand: '$40.00' has no unit"),
    (FULL.replace("$40.00/h", "$-4/h"), "prices.yaml: offers[0].on_demand: $-4/h is out of bounds"),
    (
        FULL.replace("$40.00/h", "$400000/h"),
        "offers[0].on_demand: $400000/h is out of bounds: above $100,000/h for one instance; is it per hour?",
    ),
    (
        FULL.replace("instance: rack", 'instance: "ra\\e[31mck"'),
        r"offers[1].instance: 'ra\x1b[31mck' where text is needed that prints on one line",
    ),
    (FULL.replace("device: h100", "device: h1000"), "prices.yaml: offers[0].device: unknown GPU or CPU 'h1000'; did you mean"),
    (FULL.replace("on_demand: $8760/month", "ondemand: $8760/month"), "unknown key offers[1].ondemand; did you mean on_demand?"),
    (FULL.replace(", on_demand: $8760/month", ""), "prices.yaml: offers[1]: has no price; give on_demand or spot"),
    (FULL.replace("term: 1y", "term: 12"), "prices.yaml: commitments[0].term: 12 has no unit"),
    (FULL.replace("term: 1y", "term: 1.3y"), "prices.yaml: commitments[0].term: 1.3y is no whole number of months"),
    (FULL.replace("upfront: 50%", "upfront: 150%"), "prices.yaml: commitments[0].upfront: 150% is out of bounds"),
    (FULL.replace("at_most: 10", "at_most: 3"), "prices.yaml: commitments[0].at_most: 3 is less than the 4 committed"),
    (FULL.replace("term: on-demand", "term: ondemand"), "prices.yaml: discounts[1].term: unknown word 'ondemand'; did you mean on-demand?"),
    (FULL.replace("devices: 96", "devices: many"), "prices.yaml: quotas[0].devices: 'many' where a whole number from 0 up is needed"),
    (FULL.replace("$0.09/GB", "$0.09"), "prices.yaml: rates.egress: '$0.09' has no unit; a price takes one of /GB"),
    (FULL.replace("date: 2026-10-01", "date: last autumn"), "prices.yaml: date: 'last autumn' is no date"),
    (FULL.replace("mlsys: 1", "mlsys: 2"), "prices.yaml: mlsys: 2 is a version this mlsys cannot read; it reads 1"),
    (FULL.replace("kind: prices", "kind: scenario"), "prices.yaml: kind: unknown word 'scenario'"),
    (FULL.replace("source: contract 4711\n", ""), "prices.yaml: misses source"),
    (HEAD.format(catalogue="merge") + f"offers: [{OFFER}, {OFFER}]", "prices.yaml: a b r on-demand is priced twice; keep one of them"),
    (HEAD.format(catalogue="merge") + "offers: []", "prices.yaml: offers: an empty list where a list of at least one entry is needed"),
    ("a: [", "prices.yaml: line 1: is not YAML"),
    ("a: 1\na: 2", "prices.yaml: line 2: is not YAML"),
    ("- 1", "prices.yaml: a list where keys and values are needed"),
    (FULL.replace("device: h100", "device: [h100]"), "prices.yaml: offers[0].device: a list where text is needed"),
    (FULL.replace("mlsys: 1", "mlsys: true"), "prices.yaml: mlsys: True where a whole number from 0 up is needed"),
    (FULL.replace("term: 1y", "term: 1000y"), "prices.yaml: commitments[0].term: 1000y is out of bounds"),
]


@pytest.mark.parametrize(("text", "complaint"), WRONG, ids=[c[:48] for _, c in WRONG])
def test_what_does_not_hold_is_named_with_file_and_key(text: str, complaint: str) -> None:
    with pytest.raises(BadInput) as error:
        read(text)
    assert complaint in str(error.value)


def test_what_no_offer_answers_to_is_told() -> None:
    """A provider written otherwise than in the offers would quietly cost the discount, or lift the quota."""
    assert read(FULL).notes == ()
    assert read(FULL.replace("{less: 10%, provider: nebius}", "{less: 10%, provider: Nebius}")).notes == (
        "prices.yaml: discounts[0] is for no offer, so it changes nothing",
    )
    nowhere = FULL.replace("devices: 96, provider: aws, region: us-west-2", "devices: 96, provider: aws, region: us-west-22")
    assert read(nowhere).notes == ("prices.yaml: quotas[0] is for no offer, so it changes nothing",)


def test_a_price_of_a_day_to_come_is_assumed() -> None:
    """A slip in the year must not make a price fresh for ever."""
    market = read(FULL.replace("2026-10-01", "2062-10-01"))
    assert market.notes == ("prices.yaml: its prices are of 2062-10-01, which is yet to come: is the year right?",)
    assert {o.provenance for o in market.of("MI300X")} == {Provenance.ASSUMED}


def test_the_example_of_the_page_is_a_contract() -> None:
    page = (Path(__file__).parent.parent / "docs" / "cost.md").read_text(encoding="utf-8")
    market = read(page.split("```yaml\n")[1].split("```")[0])
    assert [held.committed for held in market.reservations.values()] == [4]
    assert market.quotas[0].devices == 96


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nothing\.yaml: cannot be read"):
        contract.read(tmp_path / "nothing.yaml", str, TODAY)


def test_a_file_is_read_as_its_text_is(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(FULL)
    assert contract.read(file, lambda name: hardware.find(name).id, TODAY).offers == read(FULL).offers
