"""What people read: the same words on a terminal, in HTML and in Markdown."""

from __future__ import annotations

import dataclasses
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlsys_bench import report
from mlsys_bench.journeys import catalog as catalogues
from mlsys_bench.journeys import planning
from mlsys_bench.looked_up import Catalog
from mlsys_bench.record import KINDS, Envelope, Record, kind_of
from mlsys_bench.report import content, parts, terminal
from mlsys_bench.types import (
    Bench,
    Requests,
)
from tests.sample_records import (
    PREDICTED,
    bench,
    catalog,
    checks,
    cpu_plan,
    cpu_profile,
    demo,
    doctor,
    every_record,
    head,
    items,
    loadtest,
    machine,
    measurement,
    plan,
    requests,
    verdict,
    verification,
)

GOLDEN = Path(__file__).parent / "golden"


def printed(record: Record, width: int = 80, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    terminal.show(record, console, **options)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# ---------------------------------------------------------------- the words


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("kind", every_record())
def test_every_record_fits_the_terminal(kind: str, width: int) -> None:
    text = printed(every_record()[kind], width)
    assert text.strip()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "\x1b" not in text  # no colour where there is no terminal
    assert not re.search("[\U0001f000-\U0001ffff]", text)


def test_every_kind_of_record_has_words() -> None:
    assert set(every_record()) == set(KINDS)
    said = {section.kind for record in every_record().values() for section in content.describe(record)}
    assert said == set(every_record())


def test_the_plan_reads_as_agreed() -> None:
    """The golden text at 80 columns; MLSYS_UPDATE_GOLDEN=1 writes it anew."""
    golden = GOLDEN / "plan_80.txt"
    text = "\n".join(line.rstrip() for line in printed(plan()).splitlines()) + "\n"
    if os.environ.get("MLSYS_UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_a_table_too_wide_for_the_terminal_names_what_it_leaves_out() -> None:
    text = printed(catalog())
    assert "h100-sxm" in text
    assert "80.0 GB" in text
    assert re.search(r"too wide for this terminal, see --json: column \d", text)


@pytest.mark.parametrize(
    ("rows", "shown"),
    [
        (catalogues.prices, ("$/h", "$55.04")), (catalogues.gpus, ("$/h each", "$2.95", "3.35 TB/s")),
        (catalogues.models_, ("params", "70.6 B", "141 GB")), (catalogues.apis, ("output $/1M", "$0.60", "2026-02-25")),
    ],
)  # fmt: skip
def test_a_catalogue_shows_what_it_is_asked_for_on_a_narrow_terminal(rows: Callable[[], Catalog], shown: tuple[str, ...]) -> None:
    """A list of prices showed provider, instance, device, devices and term: and no price."""
    text = printed(rows(), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(what in text for what in shown)


def test_a_machine_says_what_it_cannot_do_and_what_would_change_that() -> None:
    text = printed(doctor())
    assert "✗" in text
    assert "install one, or measure on the CPU" in text


def test_a_plan_that_misses_a_limit_after_all_says_so_first_and_ends_with_1() -> None:
    """Short simulations kept it, longer ones none: 251 replicas 'carry' the traffic, with a cross far below, and exit status 0."""
    kept = dataclasses.replace(plan(), slo="ttft_p95<500ms", predicted={**plan().predicted, "ttft_p95_s": 0.45})
    late = dataclasses.replace(kept, predicted={**kept.predicted, "ttft_p95_s": 0.55})
    leads = [content.describe(p)[0].lead for p in (kept, late)]
    assert ["Simulated for longer it misses ttft_p95<500ms" in lead for lead in leads] == [False, True]
    assert [planning.exit_status(p) for p in (kept, late)] == [0, 1]


def test_a_plan_says_fleet_cost_limit_headroom_and_where_each_comes_from() -> None:
    text = " ".join(printed(plan(), 120).split())
    for said in (
        "8 replicas",
        "$55.04/h",
        "$40,179/month",
        "$0.30 per 1M",
        "71.3 %",
        "ttft_p95 < 500 ms",
        "+21 %",
        "roofline",
        "assumed",
        "2025-11-20",
    ):
        assert said in text
    assert "231 ms" in text
    assert "180–303 ms" in text
    assert "p95 < 500ms ✓" in text


def test_a_broken_limit_is_marked() -> None:
    text = printed(plan(predicted=PREDICTED | {"ttft_p95_s": 0.7}))
    assert "p95 < 500ms ✗" in text


def test_the_next_best_is_the_cheapest_that_would_do() -> None:
    section = content.describe(plan())[0]
    assert next(f.text for f in section.facts if f.label == "Next best") == "4 x h100-sxm (fp8, tp 2) at $55.04/h"


def test_an_unpriced_plan_says_so_instead_of_a_cost() -> None:
    text = printed(plan(usd_per_hour=None, usd_per_month=None, usd_per_million_tokens=None, prices=()))
    assert "unpriced" in text
    assert "None" not in text
    assert "$0.00" not in text


def test_a_sample_that_is_too_small_says_too_few() -> None:
    text = printed(loadtest())
    assert "too few" in text
    assert "tpot_p99<30ms" in text
    assert [line.split()[-1] for line in text.splitlines() if line.strip().startswith("tpot_p99<30ms")] == ["?"]


def test_errors_and_doubts_of_a_load_test_are_not_hidden() -> None:
    text = " ".join(printed(loadtest(), 120).split())
    assert "3 timeout, 1 rejected" in text
    assert "degraded" in text
    assert "more than 5 ms late" in text


def test_checks_say_inside_outside_and_not_measured() -> None:
    table = content.describe(verification())[0].tables[0]
    by_name = {row[0].text: row for row in table.rows}
    assert by_name["TTFT p50"][-1].text == "✓"
    assert by_name["TTFT p95"][-1].text == "✗"
    assert by_name["E2E p95"][-1].text == "?"
    assert by_name["TTFT p95"][3].text == "-20.7 %"


def test_skipped_benchmarks_are_named_with_the_reason() -> None:
    assert "gemm.fp8: this CPU has no fp8 units" in printed(bench())
    twice = dataclasses.replace(bench(), measurements=(*bench().measurements, bench().measurements[-1]))
    assert "2 x gemm.fp8: this CPU has no fp8 units" in printed(twice)


def test_without_details_only_the_managers_part_is_printed() -> None:
    short, full = printed(plan(), details=False), printed(plan())
    assert "What else was considered" in full
    assert "What else was considered" not in short
    assert len(short.splitlines()) <= 32  # one screen


def test_a_terminal_without_utf8_still_gets_the_words() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    terminal.show(plan(), Console(file=file, width=80, color_system=None))
    file.flush()
    assert b"p95 < 500ms y" in raw.getvalue()


def test_the_terminal_report_imports_neither_matplotlib_nor_jinja() -> None:
    import subprocess
    import sys

    code = (
        "import sys, mlsys_bench.report.terminal; print([m for m in ('matplotlib', 'jinja2', 'pandas', 'scipy.stats') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- numbers


def test_numbers_print_three_digits_in_one_unit() -> None:
    assert parts.digits(1234.5) == "1,234"
    assert parts.digits(0.012345) == "0.0123"
    assert parts.time(0.0421) == "42.1 ms"
    assert parts.time_span((0.9, 1.1), like=1.0) == "0.900–1.10 s"  # never '900 ms–1.10 s'
    assert parts.quantity(4.1e10, "B/s", (4.0e10, 4.2e10)) == ("41.0 GB/s", "40.0–42.0 GB/s")
    assert parts.quantity(0.0021, "s", None) == ("2.10 ms", "")
    assert parts.ratio(1.052) == "+5.2 %"
    assert parts.parameters({"m": 512.0, "zero": 0, "none": None, "flag": False}) == "m 512, flag no"


# ---------------------------------------------------------------- HTML


def demo_items() -> list[tuple[str, Envelope, Record]]:
    return items(demo(), requests(), bench(), cpu_profile(), plan())


@pytest.fixture(scope="module")
def page() -> str:
    from mlsys_bench.report import html

    return html.render(demo_items())


def test_the_page_holds_every_picture(page: str) -> None:
    """Prediction, cost of alternatives, fit, latency over time, distribution, throughput, roofline."""
    import base64

    uris = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)" alt="[^"]+">', page)
    images = [base64.b64decode(uri) for uri in uris]
    assert len(images) == 7
    assert all(image.startswith(b"<?xml") and b"</svg>" in image for image in images)


def test_the_page_asks_nobody_for_anything(page: str) -> None:
    assert not re.search(r"""(?:src|href|action|data|poster)\s*=\s*["']?\s*(?:https?:)?//""", page)
    assert not re.search(r"<script|<iframe|<link(?! rel=\"icon\" href=\"data:,\")|@import|url\(", page)


def test_the_page_names_machine_digests_time_and_version(page: str) -> None:
    from mlsys_bench import __version__

    for said in ("AMD EPYC 7B13", "sha256:0f0f", "2026-01-15T10:00:00", f"mlsys {__version__}", "requests.json"):
        assert said in page


def test_the_answer_stands_at_the_top(page: str) -> None:
    top = page[page.index("<header>") : page.index("</header>")]
    assert "TTFT p50 error" in top
    assert "-5.7 %" in top
    assert "per 1M output tokens" in top


def test_a_demo_and_its_plan_file_show_the_plan_once() -> None:
    from mlsys_bench.report import html

    titles = [section.title for _, section in html.ordered(items(demo(), demo().plan, demo().measured))]
    assert len(titles) == len(set(titles)) == 3


HOSTILE = '<script>alert(1)</script>" onload="x| $b$ `'


@pytest.mark.parametrize("kind", ["plan", "demo", "profile", "bench", "verdict", "loadtest"])
def test_hostile_names_stay_text(kind: str) -> None:
    from mlsys_bench.report import html

    layout = dataclasses.replace(cpu_profile().layout, model=HOSTILE)
    hostile: dict[str, Record] = {
        "plan": plan(model=HOSTILE, slo="ttft_p95<500ms"),
        "demo": dataclasses.replace(demo(), plan=plan(model=HOSTILE), files={HOSTILE: HOSTILE}),
        "profile": dataclasses.replace(cpu_profile(), layout=layout),
        "bench": Bench(measurements=(measurement(HOSTILE, (1.0, 2.0), {HOSTILE: HOSTILE}),)),
        "verdict": dataclasses.replace(verdict(), reasons=(HOSTILE,)),
        "loadtest": loadtest(target=HOSTILE),
    }
    head_, record = head(hostile[kind]), hostile[kind]
    text = html.render([(HOSTILE, head_, record)])
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert 'onload="x' not in text


def test_the_page_is_the_same_twice() -> None:
    from mlsys_bench.report import html

    assert html.render(items(plan())) == html.render(items(plan()))


def test_every_record_becomes_a_page_and_markdown() -> None:
    from mlsys_bench.report import html, markdown

    for kind, record in every_record().items():
        assert content.describe(record)[0].title.split(":")[0] in html.render(items(record)), kind
        assert content.describe(record)[0].title.split(":")[0] in markdown.render(items(record)), kind


def test_templates_compile_and_refuse_names_nobody_gave() -> None:
    import jinja2

    from mlsys_bench.report.templates import environment

    made = environment(escape=True)
    assert {"report.html.j2", "report.md.j2"} <= set(made.list_templates())
    for name in made.list_templates(extensions=["j2"]):
        with pytest.raises(jinja2.UndefinedError):
            made.get_template(name).render()


# ---------------------------------------------------------------- pictures


def drawn(record: Record) -> int:
    from mlsys_bench.report import pictures

    return len(pictures.draw(items(record)) or ())


def test_records_without_a_picture_have_none() -> None:
    assert drawn(loadtest()) == 0
    no_work = dataclasses.replace(bench(), measurements=bench().measurements[-2:])  # bandwidth alone, and what was skipped
    assert drawn(no_work) == 0
    assert drawn(cpu_plan()) == 0  # no alternatives, nothing to compare
    assert drawn(Requests(t0_unix_s=0.0, requests=())) == 0


def test_a_run_in_which_nothing_was_answered_still_has_its_timeline() -> None:
    failed = tuple(dataclasses.replace(r, outcome="connect", token_s=(), tokens_per_event=(), done_s=None) for r in requests(20).requests)
    assert drawn(Requests(t0_unix_s=0.0, requests=failed)) == 1


def test_the_fit_shows_every_cell_of_its_layout_and_no_other() -> None:
    from mlsys_bench.report import figures

    other = dataclasses.replace(cpu_profile(), layout=dataclasses.replace(cpu_profile().layout, threads=2))
    assert figures.step_fit(bench(), other, "x") is None
    figure = figures.step_fit(bench(), cpu_profile(), "x")
    assert figure is not None
    points = {line.get_label(): len(line.get_xdata()) for line in figure.axes[0].get_lines()}
    assert points["decode, measured"] + points["prefill, measured"] == 20
    assert points["physics floor of that step"] == 20


def test_text_on_pictures_is_at_least_eleven_points() -> None:
    from matplotlib.text import Text

    from mlsys_bench.report import figures

    made = [
        figures.prediction(checks(), "x"), figures.alternatives(plan(), "x"), figures.timeline(requests(), "x"),
        figures.distribution(requests(), PREDICTED, {}, "x"), figures.load(requests(), "x"),
    ]  # fmt: skip
    sizes = [text.get_fontsize() for figure in made if figure for text in figure.findobj(Text) if text.get_text()]
    assert min(sizes) >= 11


def test_drawing_leaves_the_users_matplotlib_settings_alone() -> None:
    import matplotlib

    from mlsys_bench.report import figures

    before = dict(matplotlib.rcParams)
    figures.uri(figures.prediction(checks(), "x"))
    assert dict(matplotlib.rcParams) == before


# ---------------------------------------------------------------- files


def test_files_are_written_where_asked(tmp_path: Path) -> None:
    page, short = report.write_html(tmp_path / "new" / "r.html", items(plan())), report.write_markdown(tmp_path / "r.md", items(plan()))
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert "## Plan: llama-3-8b at 200/s" in short.read_text(encoding="utf-8")


def test_a_file_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    from mlsys_bench.errors import BadInput

    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        report.write_markdown(tmp_path / "file" / "r.md", items(plan()))


def test_markdown_tables_keep_their_columns() -> None:
    from mlsys_bench.report import markdown

    text = markdown.render(items(plan(model="a|b"), verdict()))
    tables = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert tables
    assert "a\\|b" in text
    blocks = re.split(r"\n(?=[^|])", re.sub(r"\\\|", "", text))
    for block in blocks:
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1


def test_records_load_by_file_name(tmp_path: Path) -> None:
    from mlsys_bench import record

    path = record.write(tmp_path / "plan.json", plan(), machine())
    assert [(name, kind_of(value)) for name, _, value in report.load([path])] == [("plan.json", "plan")]
