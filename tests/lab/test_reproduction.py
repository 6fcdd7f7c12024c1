import hashlib
import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from seqwise.core.errors import UsageError
from seqwise.lab import catalogue, reproduction
from seqwise.lab.intervals import Interval
from seqwise.lab.reproduction import Claim, Measured, Reproduction, judge, reproduce, run_reproductions, table

BETTER = Claim("better", "ours finds more", "82 % against 70 %", ">", 0.1, "random tokens")
LOSSLESS = Claim("lossless", "nothing is lost", "0.38 % lost", ">=", 0.05, "full cache")
LARGE = Claim("large", "also on large models", "70B", ">", 0.0, "none")

SLUG = "zipcache"


def measure(seed, progress):
    progress("training")
    return {
        "better": Measured([0.9, 0.8 + seed / 100, 0.9], [0.5, 0.5, 0.4]),
        "lossless": Measured([0.9, 0.8, 0.9], [0.9, 0.8, 0.9]),
    }


REP = Reproduction(SLUG, [BETTER, LOSSLESS], measure, notes="tiny")


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    """A paper file, results and a cache of the test's own."""
    monkeypatch.setenv("SEQWISE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / catalogue.paper(SLUG).home  # reads the catalogue, which then stays in memory
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path)
    monkeypatch.setattr(reproduction, "RESULTS", tmp_path / "results")
    file.parent.mkdir(parents=True)
    file.write_text("the paper's file")
    return tmp_path


@pytest.mark.parametrize("field, value", [("direction", "=="), ("margin", -0.1), ("margin", math.nan)])
def test_claim_refuses(field, value):
    with pytest.raises(ValueError, match=rf"Claim.{field} must be .*, got "):
        replace(BETTER, **{field: value})


def test_a_no_loss_claim_needs_a_margin():
    with pytest.raises(ValueError, match=r"Claim\.margin must be > 0 for '>=', got 0\.0"):
        replace(LOSSLESS, margin=0.0)
    assert replace(BETTER, margin=0.0).margin == 0.0


@pytest.mark.parametrize("ours, baseline", [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([1.0], [math.inf])])
def test_measured_refuses(ours, baseline):
    with pytest.raises(ValueError, match="Measured"):
        Measured(ours, baseline)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seeds": (0, 1)}, "seeds must be at least 3"),
        ({"seeds": (0, 1, 1)}, "seeds must be at least 3 distinct"),
        ({"claims": []}, "at least one"),
        ({"claims": [BETTER, BETTER]}, "distinct keys"),
        ({"not_testable": {"other": "why"}}, "must name claims"),
    ],
)
def test_reproduction_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        replace(REP, **change)


@pytest.mark.parametrize(
    "direction, low, high, holds",
    [
        (">", 0.11, 0.5, True),
        (">", 0.1, 0.5, False),  # must lie beyond, not at, the margin
        ("<", -0.5, -0.11, True),
        ("<", -0.5, -0.1, False),
        ("<", 0.11, 0.5, False),
        (">=", -0.09, 0.5, True),
        (">=", -0.11, 0.5, False),
        ("<=", -0.5, 0.09, True),
        ("<=", -0.5, 0.11, False),
    ],
)
def test_judge(direction, low, high, holds):
    claim = replace(BETTER, direction=direction)
    assert judge(claim, Interval((low + high) / 2, low, high)) == ("holds" if holds else "does not hold")


def test_result_document(places):
    said = []
    document = reproduce(REP, said.append)
    assert document == json.loads((places / "results" / f"{SLUG}.json").read_text())
    better, lossless = document["claims"]
    assert better["ours_mean"] == pytest.approx((0.9 + 0.81 + 0.9) / 3)  # mean over seeds 0, 1, 2
    assert better["baseline_mean"] == pytest.approx(1.4 / 3)
    assert better["difference"] == pytest.approx(better["ours_mean"] - better["baseline_mean"])
    assert better["interval"][0] < better["difference"] < better["interval"][1]
    assert better["verdict"] == lossless["verdict"] == document["verdict"] == "holds"
    assert lossless["interval"] == [0.0, 0.0] and lossless["bound"] == -0.05
    assert document["seeds"] == [0, 1, 2] and document["notes"] == "tiny"
    assert document["paper_sha256"] == hashlib.sha256(b"the paper's file").hexdigest()
    assert {"date", "seconds", "versions"} <= set(document)
    assert said[:2] == ["zipcache: seed 0 (1 of 3)", "zipcache: seed 0 (1 of 3), training"]
    assert not list((places / "cache" / "reproduce").iterdir())
    assert not catalogue.paper(SLUG).stale


def test_one_claim_that_fails_decides_and_an_untestable_one_does_not():
    strict = replace(REP, claims=[replace(BETTER, margin=0.9), LOSSLESS])
    assert [claim["verdict"] for claim in reproduce(strict, print)["claims"]] == ["does not hold", "holds"]
    assert reproduce(strict, print)["verdict"] == "does not hold"
    partly = replace(REP, claims=[BETTER, LOSSLESS, LARGE], not_testable={"large": "too large"})
    document = reproduce(partly, print)
    assert document["verdict"] == "holds"
    assert document["claims"][2]["verdict"] == "not testable at this size"
    assert document["claims"][2]["reason"] == "too large"
    nothing = Reproduction(SLUG, [LARGE], lambda seed, progress: {}, not_testable={"large": "too large"})
    assert reproduce(nothing, print)["verdict"] == "not testable at this size"


@pytest.mark.parametrize("answer", [{}, {"better": Measured([1.0], [0.0])}])
def test_measure_must_answer_the_testable_claims(answer):
    with pytest.raises(ValueError, match="must answer"):
        reproduce(replace(REP, measure=lambda seed, progress: answer), print)


def interrupted_after(seeds, calls):
    def stops(seed, progress):
        if len(calls) == seeds:
            raise KeyboardInterrupt
        calls.append(seed)
        return measure(seed, progress)

    return stops


def test_an_interrupted_run_goes_on_where_it_stopped(places):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        reproduce(replace(REP, measure=interrupted_after(2, calls)), print)
    assert calls == [0, 1] and not (places / "results").exists()
    document = reproduce(replace(REP, measure=interrupted_after(99, calls)), print)
    assert calls == [0, 1, 2]
    whole = reproduce(replace(REP, measure=interrupted_after(99, [])), print)
    assert whole["claims"] == document["claims"]  # resumed values are the values


def test_kept_seeds_are_dropped_when_the_paper_changed_or_by_force(places):
    calls = []
    for change in ("paper", "force", "garbage"):
        with pytest.raises(KeyboardInterrupt):
            reproduce(replace(REP, measure=interrupted_after(2, calls)), print)
        if change == "paper":
            (places / catalogue.paper(SLUG).home).write_text("changed")
        if change == "garbage":
            (places / "cache" / "reproduce" / f"{SLUG}.json").write_text("{")
        calls.clear()
        reproduce(replace(REP, measure=interrupted_after(99, calls)), print, force=change == "force")
        assert calls == [0, 1, 2], change
        calls.clear()


def test_a_paper_without_file_or_a_folder_that_cannot_be_written_is_said(places, monkeypatch):
    (places / "results").write_text("a file where the folder belongs")
    with pytest.raises(UsageError, match=r"cannot write .*zipcache.json .*measured seeds are in"):
        reproduce(REP, print)
    assert len(json.loads((places / "cache" / "reproduce" / f"{SLUG}.json").read_text())["seeds"]) == 3
    (places / catalogue.paper(SLUG).home).unlink()
    with pytest.raises(UsageError, match=r"cannot be reproduced: methods/cache/zipcache\.py does not exist"):
        reproduce(REP, print)


def test_an_unwritable_cache_does_not_stop_a_run(places):
    (places / "cache").write_text("a file where the folder belongs")
    said = []
    assert reproduce(REP, said.append)["verdict"] == "holds"
    assert any("cannot keep it for a later run" in text for text in said)


def shown(document):
    console = Console(file=io.StringIO(), width=200)
    console.print(table(document))
    return console.file.getvalue()


def test_table_tells_claim_figure_interval_and_verdict():
    rep = replace(REP, claims=[BETTER, LOSSLESS, LARGE], not_testable={"large": "[70B] is too large"})
    text = shown(reproduce(rep, print))
    for part in (
        "82 % against 70 %",
        "random tokens: 0.4667",
        "claimed > 0.1",
        "claimed > -0.05",
        "[70B] is too large",
    ):
        assert part in text


def test_run_reproductions_skips_what_is_recorded_unless_forced(places, monkeypatch):
    calls = []
    rep = replace(REP, measure=interrupted_after(99, calls))
    monkeypatch.setattr(reproduction, "available", lambda: (SLUG,))
    monkeypatch.setattr(reproduction, "load", lambda slug: rep)
    console = Console(file=io.StringIO(), width=200)
    (first,) = run_reproductions([SLUG, SLUG], console=console)
    (again,) = run_reproductions([], all=True, console=console)
    assert calls == [0, 1, 2] and again == first
    assert "--force measures again" in console.file.getvalue()
    run_reproductions([SLUG], force=True, console=console)
    assert len(calls) == 6
    (places / catalogue.paper(SLUG).home).write_text("changed")
    run_reproductions([SLUG], console=console)
    assert len(calls) == 9


def test_interrupting_run_reproductions_says_what_is_kept(monkeypatch):
    monkeypatch.setattr(reproduction, "load", lambda slug: replace(REP, measure=interrupted_after(1, [])))
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt):
        run_reproductions([SLUG], console=console)
    assert "finished seeds are kept" in console.file.getvalue()


def test_unknown_or_no_slugs_are_refused_before_anything_runs(monkeypatch):
    with pytest.raises(UsageError, match="name a paper to reproduce, or --all"):
        run_reproductions([])
    monkeypatch.setattr(reproduction, "available", lambda: ("zipcache",))
    with pytest.raises(UsageError, match="no reproduction has the slug 'zipcash': did you mean zipcache"):
        run_reproductions(["zipcash"])


@pytest.mark.parametrize("slug", reproduction.available())
def test_every_reproduction_loads_under_its_slug(slug):
    assert reproduction.load(slug).slug == slug
