"""The catalogue says what is there, and what it says is there is there."""

import ast
import hashlib
import importlib
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from seqwise.core.errors import UsageError
from seqwise.insight.probe.token_reduction_beyond_efficiency import check_facets
from seqwise.lab import catalogue
from seqwise.lab.catalogue import Paper

TESTS = Path(__file__).resolve().parents[1]


# papers under methods/ that attach to no decoder: bidirectional video transformers of diffusers
ELSEWHERE = {"paro-attention"}


def resolve(reference: str) -> object:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


def lacking(paper: Paper, tests: Path = TESTS) -> list[str]:
    """What an implemented paper must have and this one does not."""
    home = Path(paper.home)
    parts = {
        f"file {paper.home}": paper.file.is_file(),
        f"test {home.parent}/test_{home.name}": (tests / home.parent / f"test_{home.name}").is_file(),
        f"result {paper.slug}.json": paper.result is not None,
    }
    if home.parts[0] == "methods" and paper.slug not in ELSEWHERE:
        parts[f"contract pass of {paper.slug}"] = paper.contract is not None and paper.contract["passed"] is True
    return [name for name, there in parts.items() if not there]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A complete method paper in an empty package; returns it with its package and tests folders."""
    package, tests = tmp_path / "package", tmp_path / "tests"
    files = {
        package / "methods/cache/new_one.py": '"""New. arXiv 2501.00001."""\n',
        tests / "methods/cache/test_new_one.py": "",
        package / "lab/results/contract.json": json.dumps(
            {"new-one": {"family": "llama", "passed": True, "items": [1, 2]}}
        ),
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(catalogue, "PACKAGE", package)
    paper = Paper(1, "new-one", "New", "2501.00001", "methods/cache/new_one.py", "implemented")
    sha256 = hashlib.sha256(paper.file.read_bytes()).hexdigest()
    (package / "lab/results/new-one.json").write_text(json.dumps({"verdict": "holds", "paper_sha256": sha256}))
    return paper, package, tests


def test_the_catalogue_has_every_paper_once():
    found = catalogue.papers()
    assert [paper.number for paper in found] == list(range(1, 97))
    for field in ("slug", "title", "arxiv", "home"):
        assert len({getattr(paper, field) for paper in found}) == 96, f"two papers share a {field}"


@pytest.mark.parametrize("paper", catalogue.papers(), ids=lambda paper: paper.slug)
def test_an_entry_is_well_formed(paper):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", paper.slug)
    assert re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
    assert paper.status in ("planned", "implemented")
    wing = r"methods/(reduce|cache|attend|order|decode)|insight/(explain|probe)|learn/(loss|data|nn|vision)"
    assert re.fullmatch(rf"({wing}|parallel)/{paper.slug.replace('-', '_')}\.py", paper.home)
    assert bool(paper.object) == bool(paper.formulas) == (paper.status == "implemented")


@pytest.mark.parametrize("paper", catalogue.papers(), ids=lambda paper: paper.slug)
def test_implemented_means_file_tests_result_and_contract_pass(paper):
    missing = lacking(paper)
    if paper.status == "implemented":
        assert not missing, f"{paper.slug} is marked implemented, but lacks: {', '.join(missing)}"
    else:
        assert missing, f"{paper.slug} has everything: mark it implemented in papers.toml"


@pytest.mark.parametrize(
    "paper", [p for p in catalogue.papers() if p.status == "implemented"], ids=lambda paper: paper.slug
)
def test_an_implemented_paper_resolves(paper):
    references = (paper.object, *paper.formulas)
    assert len(set(references)) == len(references)
    for reference in references:
        assert callable(resolve(reference)), f"{reference} is not callable"
    docstring = ast.get_docstring(ast.parse(paper.file.read_text(encoding="utf-8"))) or ""
    assert paper.arxiv in docstring, f"the docstring of {paper.home} does not name arXiv {paper.arxiv}"
    if paper.home.startswith("methods/"):
        from seqwise.core.method import Method

        assert issubclass(resolve(paper.object), Method) == (paper.slug not in ELSEWHERE), f"{paper.object}: a Method?"


def test_each_missing_part_is_noticed(fake):
    paper, package, tests = fake
    assert lacking(paper, tests) == []
    for part in (
        package / "methods/cache/new_one.py",
        tests / "methods/cache/test_new_one.py",
        package / "lab/results/new-one.json",
        package / "lab/results/contract.json",
    ):
        kept = part.read_bytes()
        part.unlink()
        assert len(lacking(paper, tests)) == 1, f"{part.name} is not missed"
        part.write_bytes(kept)
    (package / "lab/results/contract.json").write_text('{"new-one": {"family": "llama", "passed": false, "items": []}}')
    assert lacking(paper, tests) == ["contract pass of new-one"]


def test_explainers_need_no_contract_pass(fake):
    _, _, tests = fake
    probe = Paper(2, "new-probe", "New", "2501.00002", "insight/probe/new_probe.py", "implemented")
    assert lacking(probe, tests) == [
        "file insight/probe/new_probe.py",
        "test insight/probe/test_new_probe.py",
        "result new-probe.json",
    ]


def test_a_result_is_stale_once_the_papers_file_changes(fake):
    paper, package, _ = fake
    assert (paper.verdict, paper.stale) == ("holds", False)
    with paper.file.open("a") as file:
        file.write("# changed\n")
    assert (paper.verdict, paper.stale) == ("holds", True)
    paper.file.unlink()
    assert paper.stale
    (package / "lab/results/new-one.json").unlink()
    assert (paper.verdict, paper.stale) == (None, False)


def test_a_paper_is_found_by_its_slug():
    assert catalogue.paper("zipcache").arxiv == "2405.14256"


@pytest.mark.parametrize(
    "slug, hint",
    [
        ("zip-cache", "did you mean zipcache"),
        ("fopro", "did you mean fopru"),
        ("qqqqqqqq", "`seqwise papers` lists them all"),
        ("", "`seqwise papers` lists them all"),
    ],
)
def test_an_unknown_slug_gets_a_hint(slug, hint):
    with pytest.raises(UsageError, match=re.escape(hint)) as caught:
        catalogue.paper(slug)
    assert repr(slug) in str(caught.value)


def test_the_table_fits_80_columns_and_shows_titles_as_they_are():
    console = Console(width=80)
    with console.capture() as capture:
        console.print(catalogue.table(catalogue.papers()))
    text = capture.get()
    assert "[CLS] Token Tells Everything" in text  # not read as markup
    assert all(paper.slug in text and paper.arxiv in text for paper in catalogue.papers())
    assert max(map(len, text.splitlines())) <= 80


def test_the_table_shows_verdict_and_staleness(fake):
    paper, *_ = fake
    paper.file.write_text('"""Changed."""\n')
    console = Console(width=120)
    with console.capture() as capture:
        console.print(catalogue.table([paper]))
    assert "implemented, holds (stale)" in capture.get()
    assert "1 papers, 1 implemented" in capture.get()


def test_facets_are_those_of_the_taxonomy_and_filter_the_papers():
    placed = [paper for paper in catalogue.papers() if paper.facets]
    assert len(placed) >= 18
    for paper in placed:
        assert check_facets(paper.facets) == paper.facets
    merging = [
        paper.slug for paper in catalogue.with_facets(catalogue.papers(), ["strategy=merge", "modality=multimodal"])
    ]
    assert {"visiondrop", "vflowopt", "vmtc-cmai"} <= set(merging) and "vtc-cls" not in merging
    assert catalogue.with_facets(catalogue.papers(), []) == list(catalogue.papers())
    for text in ("strategy=merg", "colour=red", "strategy"):
        with pytest.raises(UsageError, match=f"--facet {text}: facet"):
            catalogue.with_facets(placed, [text])
