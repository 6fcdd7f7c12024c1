"""The HTML report: what it states, what it must not state, and how it looks in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.core.errors import UsageError
from seqwise.lab import report
from seqwise.lab.report import Cell, Entry, Page, Panel, Strip, Table, measure, render, spread, ticks, write_report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"
BYTES = 1 << 20
Document = dict[str, Any]


def row(method: str, value: float | None = 0.5, **facts: Any) -> Document:
    """A row of the document; `difference` as (value, low, high), `share` of the plain model's cache."""
    share, difference = facts.pop("share", 0.25), facts.pop("difference", None)
    full = {
        "method": method, "task": "needle", "mode": "blind", "length": 512, "n": 12, "metric": "accuracy",
        "value": value, "low": None if value is None else value - 0.1, "high": None if value is None else value + 0.1,
        "difference": None if difference is None else dict(zip(("value", "low", "high"), difference, strict=True)),
        "kept_tokens": 512 * share, "kept_share": share, "cache_bytes": round(BYTES * share),
        "live_bytes": round(BYTES * share), "plain_bytes": BYTES, "peak_bytes": BYTES,
        "attention_work": 0.7, "prefill_ratio": 1.1, "decode_ratio": 0.95,
        "acted": True, "status": "ok", "reason": None, "per_prompt": [],
    }  # fmt: skip
    return full | facts


def plain(**facts: Any) -> Document:
    return row("Full()", 0.9, share=1.0, acted=False, **facts)


def failure(method: str, reason: str, **facts: Any) -> Document:
    empty = dict.fromkeys(("low", "high", "cache_bytes", "plain_bytes", "kept_share", "attention_work"))
    return row(method, None, n=0, acted=False, status="failed", reason=reason, **empty, **facts)


def document(*rows: Document, **facts: Any) -> Document:
    """A comparison's document; without rows, one with every kind of row."""
    if not rows:
        kinds = [("needle", "blind", "accuracy"), ("needle", "aware", "accuracy"), ("perplexity", "blind", "nll")]
        for task, mode, metric in kinds:
            cell = {"task": task, "mode": mode, "metric": metric}
            rows += (
                plain(**cell),
                row("Recent(budget=0.25)", 0.4, difference=(-0.5, -0.7, -0.3), **cell),
                row("Random(budget=0.25)", 0.4, share=0.26, difference=(0.1, -0.1, 0.3), **cell),
                row("A2SF(budget=0.5)", 0.6, share=0.5, acted=False, difference=(0.0, 0.0, 0.0), **cell),
                failure(f"Broken{HOSTILE}(budget=1)", f"no {HOSTILE} here", **cell),
            )
    kept = {
        "Full()": [1.0] * 6,
        "Recent(budget=0.25)": [1.0, 0.0, 0.04, 0.5, 1.0, 1.0],
        f"Broken{HOSTILE}(budget=1)": [0.5] * 6,
    }
    return {
        "schema": "seqwise.compare/1",
        "settings": {"model": "tiny", "methods": [HOSTILE], "prompts": 12, "chunk": None, "quick": False},
        "versions": {"torch": "2.13.0", "other": HOSTILE},
        "date": "2025-03-01T12:00:00+00:00",
        "complete": True,
        "rows": list(rows),
        "equal_cost": [],
        "sample": {"tokens": ["The", " number", HOSTILE, "\n", " is", " 7"], "kept": kept},
        "notes": [f"left out: {HOSTILE}"],
    } | facts


class Elements(HTMLParser):
    """Every element with its attributes, and all text outside style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag in self.raw:
            self._inside = tag
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw[self._inside][-1] += data
        else:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)


# what it states


def test_another_schema_is_refused():
    with pytest.raises(UsageError, match=r"schema 'seqwise.compare/1', got 'other/2'"):
        render(document() | {"schema": "other/2"})


def test_an_interval_without_zero_is_a_loss_or_gain_whichever_way_is_better():
    entry = Entry(1, "A", "A", 1)
    seen = {
        (metric, difference): Cell(entry, row("A", metric=metric, difference=difference)).verdict
        for metric in ("accuracy", "nll", "kl")
        for difference in ((-0.5, -0.7, -0.3), (0.5, 0.3, 0.7), (0.1, -0.1, 0.3), (0.0, 0.0, 0.0))
    }
    assert [seen["accuracy", d] for d in ((-0.5, -0.7, -0.3), (0.5, 0.3, 0.7))] == ["loss", "gain"]
    assert [seen["nll", d] for d in ((-0.5, -0.7, -0.3), (0.5, 0.3, 0.7))] == ["gain", "loss"]
    assert [seen["kl", d] for d in ((-0.5, -0.7, -0.3), (0.5, 0.3, 0.7))] == ["gain", "loss"]
    assert {seen[m, d] for m in ("accuracy", "nll") for d in ((0.1, -0.1, 0.3), (0.0, 0.0, 0.0))} == {"within noise"}


def test_the_headline_counts_losing_methods_per_mode_apart():
    found = dict(
        Page(
            document(
                plain(),
                row("A", difference=(-0.5, -0.7, -0.3)),
                row("B", difference=(0.0, -0.2, 0.2)),
                plain(mode="aware"),
                row("A", mode="aware", n=20, difference=(0.0, -0.2, 0.2)),
                row("B", mode="aware", difference=(0.1, -0.2, 0.4)),
            )
        ).headline
    )
    assert found["Question-blind"] == (
        "On 12 prompts, 1 of 2 methods measurably loses quality. Within noise of the plain model, or above it: B."
    )
    assert found["Question-aware"] == "On 12 to 20 prompts, none of 2 methods loses quality measurably."


def test_blind_and_aware_stand_apart_and_are_never_averaged():
    page = Page(document(plain(), plain(mode="aware"), row("A", 0.2), row("A", 0.8, mode="aware")))
    assert [(mode, len(panel.points)) for _, panels in page.panels for mode, panel in panels] == [
        ("blind", 2),
        ("aware", 2),
    ]
    assert [mode for _, mode, _ in page.tables] == ["blind", "aware"]
    text = Elements(render(document(plain(), plain(mode="aware"), row("A", 0.2), row("A", 0.8, mode="aware")))).text
    assert (
        "20\xa0%" in text and "80\xa0%" in text and "50\xa0%" not in text.split("Methods")[1].split("What was kept")[0]
    )


def test_under_30_prompts_no_ranking_is_stated():
    groups = [{"task": "needle", "mode": "blind", "length": 512, "metric": "accuracy", "cost": "cache_bytes",
               "share": [0.25, 0.25], "methods": ["A", "B"], "tiers": None}]  # fmt: skip
    few = Elements(render(document(plain(n=29), row("A", n=29), row("B", n=29), equal_cost=groups))).text
    assert "Under 30 prompts: no ranking." in few and "No ranking" in few
    assert not re.search(r"rank \d", few)

    groups[0]["tiers"] = [["B"], ["A"]]
    many = Elements(render(document(plain(n=30), row("A", n=30), row("B", n=30), equal_cost=groups))).text
    assert "no ranking" not in many.lower()
    assert re.search(r"B\s*rank 1.*A\s*rank 2", many, re.DOTALL)


def test_methods_of_equal_attention_work_are_named_together():
    group = {"task": "needle", "mode": "blind", "length": 512, "metric": "accuracy", "cost": "attention_work",
             "share": [0.6, 0.64], "methods": ["A", "B"], "tiers": None}  # fmt: skip
    text = " ".join(Elements(render(document(plain(), row("A"), row("B"), equal_cost=[group]))).text.split())
    assert "Equal attention work at 60 to 64 %: A, B." in text


def test_a_table_groups_cells_of_equal_bytes_and_puts_unmeasured_cost_last():
    entries = [Entry(i, name, name, 1) for i, name in enumerate("ABCDE")]
    shares = (0.5, 0.271, 0.25, 0.27, None)
    rows = [
        row(e.name, share=share or 0, **({} if share else {"cache_bytes": None}))
        for e, share in zip(entries, shares, strict=True)
    ]
    table = Table([Cell(entry, one) for entry, one in zip(entries, rows, strict=True)], [])
    assert [[cell.entry.name for cell in group] for group in table.groups] == [["B", "C", "D"], ["A"], ["E"]]


def test_failed_and_idle_methods_are_marked_and_the_plain_model_is_not():
    page = Page(document())
    broken, idle = page.entries[4], page.entries[3]
    assert page.failures(broken) == {
        f"no {HOSTILE} here": ["needle, question-blind", "needle, question-aware", "perplexity, question-blind"]
    }
    assert page.failed(broken) and not page.failed(idle)
    assert [page.idle(entry) for entry in page.entries] == [False, False, False, True, False]
    html = Elements(render(document()))
    badges = [facts["class"] for tag, facts in html.found if "badge" in (facts.get("class") or "")]
    assert badges.count("badge warn") == 1 + 3  # its row and its three tables
    assert badges.count("badge bad") == 1 + 3
    assert sum("disc idle" in (facts.get("class") or "") for _, facts in html.found) == 3


def test_a_method_that_failed_on_one_task_says_on_which():
    page = Page(document(plain(), row("A"), plain(task="kv"), failure("A", "too short", task="kv")))
    assert not page.failed(page.entries[1])
    text = " ".join(
        Elements(
            render(document(plain(), row("A"), plain(task="kv"), failure("A", "too short", task="kv")))
        ).text.split()
    )
    assert "failed kv, question-blind: too short" in text


@pytest.mark.parametrize(
    "rows", [(), (plain(n=1, low=None, high=None), row("A", n=1, low=None, high=None, difference=(0.1, None, None)))]
)
def test_unfinished_documents_render(rows: tuple[Document, ...]):
    text = Elements(render(document() | {"rows": list(rows), "sample": {}, "complete": False})).text
    assert "Settings and versions" in text and "What was kept" not in text
    assert ("Unfinished" in text) and ("None" not in text)


def test_there_is_one_row_per_method_and_a_caption_per_table():
    html = render(document())
    body = html.split('<table class="methods">')[1].split("<tbody>")[1].split("</tbody>")[0]
    assert body.count("<tr>") == 5
    elements = Elements(html)
    assert elements.count("table") == elements.count("caption") == 1 + 3 + 2


def test_costs_of_several_tasks_are_a_range():
    page = Page(document(plain(), row("A", share=0.24), row("A", share=0.31, task="kv")))
    assert spread(page.costs(page.entries[1], "cache_bytes"), report.percent) == "24 to 31\xa0%"
    assert spread([0.25, 0.2501], report.percent) == "25\xa0%"
    assert spread([1.0, 1.25], report.times) == "1.00 to 1.25×"


# escaping


def test_what_others_wrote_is_text_and_nothing_else():
    rows = (plain(task=HOSTILE), row(HOSTILE, task=HOSTILE), failure("F", HOSTILE, task=HOSTILE))
    for html in (render(document()), render(document(*rows))):
        elements = Elements(html)
        assert elements.count("script") == 1 and elements.count("img") == 0
        assert not [name for _, facts in elements.found for name in facts if name.startswith("on")]
        assert elements.text.count(HOSTILE) >= 5


def test_the_policy_lets_run_exactly_the_page_own_script():
    elements = Elements(render(document()))
    policy = next(
        facts["content"] for tag, facts in elements.found if facts.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(elements.raw["script"][0].encode()).digest()).decode()
    assert policy is not None and f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy


def test_nothing_is_loaded_from_elsewhere():
    for tag, facts in Elements(html := render(document())).found:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert (facts.get(name) or "data:").startswith("data:"), f"<{tag} {name}={facts[name]}>"
    assert "url(" not in html and "@import" not in html


# the chart


def panel_of(values: list[float], half: float, share: float = 0.25, metric: str = "accuracy") -> Panel:
    entries = [Entry(i, f"M{i}", f"M{i}", 1) for i in range(len(values))]
    cells = [
        Cell(e, row(e.name, v, low=v - half, high=v + half, share=share, metric=metric))
        for e, v in zip(entries, values, strict=True)
    ]
    return Panel(cells, cells)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 0.5), st.sampled_from([0.0, 0.25, 1.0]))
def test_marks_of_equal_cost_never_hide_each_other(values: list[float], half: float, share: float):
    panel = panel_of(values, half, share)
    places = [(x, panel.y(c.quality.value), panel.y(c.quality.high), panel.y(c.quality.low)) for c, x in panel.points]
    assert len(places) == len(values)
    for (x, y, a, b), (u, v, c, d) in combinations(places, 2):
        assert math.hypot(x - u, y - v) >= panel.disc
        assert abs(x - u) >= panel.bar or b < c or d < a
    assert all(panel.left <= x <= panel.width - panel.right for x, *_ in places)


def test_a_lonely_mark_stands_at_its_true_cost():
    panel = panel_of([0.5], 0.1, share=0.5)
    assert panel.points[0][1] == pytest.approx(panel.x(0.5))


def test_a_band_holds_the_marks_of_equal_cost_and_no_other():
    entries = [Entry(i, f"M{i}", f"M{i}", 1) for i in range(8)]
    shares = [0.25] * 6 + [0.30, 0.33]
    cells = [Cell(e, row(e.name, 0.5, share=share)) for e, share in zip(entries, shares, strict=True)]
    panel = Panel(cells, cells)
    places = {cell.entry.number: x for cell, x in panel.points}
    inside = [{i for i, x in places.items() if a <= x <= b} for a, b in panel.bands]
    assert inside == [{0, 1, 2, 3, 4, 5}, {6, 7}]


@pytest.mark.parametrize("metric, best", [("accuracy", 0.9), ("nll", 0.1), ("logprob", 0.9)])
def test_up_is_better_whatever_the_metric(metric: str, best: float):
    panel = panel_of([0.1, 0.5, 0.9], 0.01, metric=metric)
    heights = {cell.quality.value: panel.y(cell.quality.value) for cell, _ in panel.points if cell.quality}
    assert min(heights, key=lambda value: heights[value]) == best  # the y of SVG grows downward
    assert all(panel.top <= y <= panel.height - panel.bottom for y in heights.values())


def test_both_modes_of_a_task_share_their_axes():
    page = Page(
        document(plain(metric="nll"), plain(metric="nll", mode="aware"), row("A", 9.0, metric="nll", mode="aware"))
    )
    (_, [(_, blind), (_, aware)]) = page.panels[0]
    assert (blind.low, blind.high, blind.most) == (aware.low, aware.high, aware.most)


def test_budgets_of_one_method_are_joined_and_share_a_colour():
    names = [
        "A2SF(budget=0.5, forget=0.9)",
        "A2SF(budget=0.25, forget=0.9)",
        "A2SF(budget=0.25, forget=1.0)",
        "Recent(budget=(0.1, 0.2))",
    ]
    page = Page(document(plain(), *(row(name, share=0.2 + 0.2 * i) for i, name in enumerate(names))))
    a, b, c, d = page.entries[1:]
    assert a.colour == b.colour and len({a.colour, c.colour, d.colour, page.entries[0].colour}) == 4
    assert d.family == "Recent()"
    assert len(page.panels[0][1][0][1].lines) == 1


def test_the_difference_is_drawn_better_to_the_right():
    entry = Entry(1, "A", "A", 1)
    for metric, sign in (("accuracy", 1), ("nll", -1)):
        table = Table([cell := Cell(entry, row("A", metric=metric, difference=(0.5, 0.25, 1.0)))], [])
        low, value, high = table.forest(cell) or (0, 0, 0)
        assert low <= value <= high and math.copysign(1, value) == sign
        assert max(abs(low), abs(high)) == 48 and abs(value) == 24


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4))
def test_ticks_are_few_round_and_inside(low: float, span: float):
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-6 * span <= tick <= low + span + 1e-6 * span for tick in found)
    step = found[1] - found[0]
    assert min(abs(step / 10 ** math.floor(math.log10(step * 1.0001)) - nice) for nice in (1, 2, 2.5, 5)) < 0.01


# text


@pytest.mark.parametrize(
    "metric, value, signed, text",
    [
        ("accuracy", 0.834, False, "83\xa0%"),
        ("accuracy", -0.12, True, "−12 points"),
        ("accuracy", 0.12, True, "+12 points"),
        ("match", -0.001, True, "0 points"),
        ("nll", 2.6, False, "2.600"),
        ("kl", 1e-17, True, "0.000"),
        ("logprob", -12.34, False, "−12.3"),
        ("nll", -0.084, True, "−0.084"),
    ],
)
def test_values_read_as_people_write_them(metric: str, value: float, signed: bool, text: str):
    assert measure(metric, value, signed=signed) == text


def test_sizes_carry_their_unit():
    assert [report.size(n) for n in (512, 1536, 5.6 * 2**20, 300 * 2**20, 2**31)] == [
        "512\xa0bytes", "1.5\xa0KiB", "5.6\xa0MiB", "300\xa0MiB", "2.0\xa0GiB"
    ]  # fmt: skip


def test_a_strip_keeps_text_shares_and_counts():
    shares = [1.0, 0.0, 0.04, 0.5, 1.0, 1.0]
    strip = Strip(None, "A", list("abcdef"), shares)
    assert "".join(text for _, text in strip.words) == "abcdef"
    assert strip.words == [(10, "a"), (0, "bc"), (5, "d"), (10, "ef")]
    assert (strip.everywhere, strip.nowhere, strip.mean) == (3, 1, pytest.approx(sum(shares) / 6))
    assert strip.paths == [(5, "M3 0h1v1h-1z"), (10, "M0 0h1v1h-1zM4 0h2v1h-2z")]


# the file


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "new" / "report.html"
    write_report(document() | {"notes": ["half a pair: \ud83d"]}, path)
    before = path.read_text(encoding="utf-8")
    assert before.startswith("<!doctype html>") and "half a pair: ?" in before

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("seqwise.lab.report.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(document(plain()), path)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"] and path.read_text(encoding="utf-8") == before


def test_a_report_weighs_little():
    assert len(render(document())) < 150_000


# in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    session.get("about:blank")  # the first page of a new profile loads pages of the browser's own
    yield session
    session.quit()


def opened(browser: Any, path: Path, width: int, scheme: str = "light") -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    long = document()
    long["rows"] += [row(f"Composed(budget=0.25) | {'Averylongname' * 8}(budget=0.25)", difference=(0.0, -0.1, 0.1))]
    long["settings"]["files"] = "x" * 400
    write_report(long, path)
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_all_of_it_without_errors_or_requests(browser: Any, written: Path, width: int, scheme: str):
    browser.get_log("performance"), browser.get_log("browser")
    opened(browser, written, width, scheme)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [written.as_uri()]

    def count(css: str) -> int:
        return len(browser.find_elements("css selector", css))

    assert (count("svg.chart"), count("svg.chart .point"), count("svg.chart .bar")) == (3, 13, 13)
    assert (count(".methods tbody tr"), count(".strip"), count("svg.heat path")) == (6, 3, 1 + 2 + 1)
    wide, seen = browser.execute_script("const r = document.documentElement; return [r.scrollWidth, r.clientWidth]")
    assert wide <= seen <= width, f"the page is {wide} pixels wide where {seen} are seen"
    colours = browser.execute_script(
        "const s = getComputedStyle(document.body);"
        "return [s.color, s.backgroundColor].map((c) => Number(c.match(/\\d+/)[0]))"
    )
    assert (colours[0] > colours[1]) == (scheme == "dark")
    assert (
        browser.execute_script("return getComputedStyle(document.querySelector('.heat path')).fill") != "rgb(0, 0, 0)"
    )


def test_a_mark_tells_its_numbers_by_keyboard_as_by_pointer(browser: Any, written: Path):
    opened(browser, written, 390)
    tip = browser.find_element("id", "tip")
    assert not tip.is_displayed()
    point = browser.find_elements("css selector", ".point")[0]
    browser.execute_script("arguments[0].focus()", point)
    assert tip.is_displayed() and "cache 25 % of plain" in tip.text
    assert point.get_attribute("aria-label").split() == tip.text.split()
    box = tip.rect
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    browser.execute_script("document.activeElement.blur()")
    assert not tip.is_displayed()


def test_text_can_be_read_on_its_background(browser: Any, written: Path):
    """Contrast of at least 4.5 (WCAG AA), for text, tips, marks and every level of the strips, in both schemes."""
    probe = """
      const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
      const light = (css) => { let sum = 0; canvas.clearRect(0, 0, 1, 1);
        for (const c of css) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
        const [r, g, b] = canvas.getImageData(0, 0, 1, 1).data;
        const f = (x) => (x /= 255) <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
        return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
      const root = getComputedStyle(document.documentElement), v = (name) => root.getPropertyValue(name);
      const pairs = [];
      for (const name of ["--ink", "--soft", "--loss", "--gain", "--warn", "--accent"])
        for (const under of ["--paper", "--card"]) pairs.push([name + " on " + under, [v(name)], [v(under)]]);
      for (let i = 0; i <= 10; i++) pairs.push(["digit on --c" + i, [v("--on-mark")], [v("--c" + i)]]);
      for (let i = 0; i <= 10; i++) {
        const span = document.createElement("span"); span.className = "k" + i;
        document.querySelector(".tokens").append(span); const s = getComputedStyle(span);
        pairs.push(["token k" + i, [s.color], [v("--card"), s.backgroundColor]]); span.remove(); }
      return pairs.map(([name, a, b]) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
        return [name, (x + .05) / (y + .05)]; });
    """
    for scheme in ("light", "dark"):
        opened(browser, written, 390, scheme)
        poor = {f"{scheme}: {name}": round(ratio, 2) for name, ratio in browser.execute_script(probe) if ratio < 4.5}
        assert not poor


# questions about images

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5Erk"
    "Jggg=="
)


def pictured(**facts: Any) -> Document:
    """A document of a comparison on two images, one of them with merged tokens, and hostile words everywhere."""

    def one(image: int, *stages: tuple[str, list[int], dict[str, list[int]]]) -> Document:
        named = [{"name": name, "kept": kept, "members": members} for name, kept, members in stages]
        return {"image": image, "tile": 0, "rows": 2, "columns": 3, "stages": named}

    pruned = [one(0, ("input", [0, 4], {}), ("layer 2", [4], {})), one(1, ("input", [1, 2], {"1": [0, 1, 3]}))]
    picture = {
        "task": HOSTILE, "mode": "aware", "length": None, "question": f"<image> <image> {HOSTILE} ?", "answer": "red",
        "images": [PIXEL, PIXEL],
        "methods": {
            "Full()": {"text": "red", "maps": []},
            f"FoPru{HOSTILE}(budget=0.5)": {"text": HOSTILE, "maps": pruned},
            "FlowCut(budget=0.5)": {"text": "a red one", "maps": []},
        },
    }  # fmt: skip
    cell = {"task": "colour", "mode": "aware", "length": None, "operations_ratio": 0.5}
    rows = [
        plain(**cell, visual_tokens={"prompt": 12.0}),
        row("FlowCut(budget=0.5)", 0.8, **cell, visual_tokens={"prompt": 12.0, "tower": 6.0, "layer 2": 3.0}),
    ]
    return document(*rows, sample={"pictures": [picture]}, **facts)


def test_what_stayed_of_the_images_is_drawn_and_what_was_written_is_escaped():
    html = render(pictured())
    found = Elements(html)
    assert found.count("image") == 2 and [attrs["id"] for tag, attrs in found.found if tag == "image"] == [
        "image-0-0",
        "image-0-1",
    ]
    assert [attrs["href"] for tag, attrs in found.found if tag == "use"] == ["#image-0-0", "#image-0-0", "#image-0-1"]
    labels = [attrs["aria-label"] for tag, attrs in found.found if tag == "svg" and attrs.get("role") == "img"]
    assert labels[-3:] == [
        "image 1, input: 2 of 6", "image 1, layer 2: 1 of 6", "image 2, input: 2 of 6, 2 merged into them",
    ]  # fmt: skip
    paths = [attrs["d"] for tag, attrs in found.found if tag == "path" and attrs.get("class") in ("stays", "merged")]
    assert paths[-2:] == ["M0 0h1v1h-1zM0 1h1v1h-1z", "M1 0h1v1h-1zM2 0h1v1h-1z"]
    assert HOSTILE not in html and "alert(1)" in found.text and "<image>" not in found.text
    assert found.text.count("red") >= 2 and "12, tower 6, layer 2 3" in found.text


@pytest.mark.parametrize(
    "url", ["javascript:alert(1)", "https://example.org/a.png", "data:text/html,x", 'x" onload="y']
)
def test_only_images_in_the_document_itself_are_shown(url: str):
    one = pictured()
    one["sample"]["pictures"][0]["images"] = [url]
    html = render(one)
    assert url not in html and Elements(html).count("image") == 0


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_cells_over_the_image(browser: Any, tmp_path: Path, width: int):
    path = tmp_path / "seen.html"
    write_report(pictured(), path)
    browser.get_log("performance"), browser.get_log("browser")
    opened(browser, path, width)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith("data:")] == [path.as_uri()]
    cuts = browser.find_elements("css selector", ".picture[open] .cut svg")
    assert len(cuts) == 3 and all(cut.is_displayed() and cut.rect["width"] > 60 for cut in cuts)
    box = "const b = arguments[0].querySelector(arguments[1]).getBoundingClientRect(); return [b.width, b.height]"
    for cut, name in ((cuts[0], "use"), (cuts[0], ".gone"), (cuts[2], ".merged")):
        assert min(browser.execute_script(box, cut, name)) > 10, name
    colour = "return getComputedStyle(document.querySelector(arguments[0])).color"
    assert browser.execute_script(colour, ".replies .right") != browser.execute_script(colour, ".replies .wrong")
    assert [e.text for e in browser.find_elements("css selector", ".replies .right")] == ["red", "a red one"]
    wide, seen = browser.execute_script("const r = document.documentElement; return [r.scrollWidth, r.clientWidth]")
    assert wide <= seen
    summary = browser.find_element("css selector", ".picture summary")
    summary.send_keys(" ")  # closes by keyboard
    assert not cuts[0].is_displayed()
