"""The documentation builds without a network, one page per paper, and no link inside it is dead."""

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from seqwise.lab import catalogue
from seqwise.lab.catalogue import Paper

BUILD = Path(__file__).resolve().parents[1] / "docs" / "build.py"


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src")]


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location("docs_build", BUILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(docs, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    docs.build(target)
    return target


def test_every_paper_has_a_page_and_is_listed(site):
    listed = (site / "papers" / "index.html").read_text(encoding="utf-8")
    for paper in catalogue.papers():
        page = (site / "papers" / f"{paper.slug}.html").read_text(encoding="utf-8")
        assert f"https://arxiv.org/abs/{paper.arxiv}" in page
        assert f'href="{paper.slug}.html"' in listed, f"{paper.slug} is in no wing of the list"


def test_titles_are_escaped(site):
    page = (site / "papers" / "reasoning-to-attend.html").read_text(encoding="utf-8")
    assert "How &lt;SEG&gt; Token Works" in page and "<SEG>" not in page


def test_links_lead_somewhere(site):
    for path in site.rglob("*.html"):
        links = Links()
        links.feed(path.read_text(encoding="utf-8"))
        assert links.found
        for link in links.found:
            if not link.startswith("https://arxiv.org/"):
                assert not re.match(r"[a-z]+:", link), f"{path.name} needs the network: {link}"
                assert (path.parent / link).is_file(), f"{path.name} links to {link}, which is not there"


def test_an_implemented_papers_page_shows_what_is_known(docs, tmp_path, monkeypatch):
    home, results = tmp_path / "methods/cache/new_one.py", tmp_path / "lab/results"
    home.parent.mkdir(parents=True)
    results.mkdir(parents=True)
    home.write_text('"""New: keep i < j.\n\n    s_j = sum_i A_ij\n\nThe rest.\n"""\n')
    claim = {"text": "loses < 1 %", "paper": "0.4 %", "verdict": "does not hold"}
    result = {"verdict": "does not hold", "paper_sha256": "of another file", "claims": [claim]}
    (results / "new-one.json").write_text(json.dumps(result))
    contract = {"new-one": {"family": "llama", "passed": True, "items": [1, 2]}}
    (results / "contract.json").write_text(json.dumps(contract))
    paper = Paper(
        *(1, "new-one", "New", "2501.00001", "methods/cache/new_one.py", "implemented"),
        object="seqwise.lab.catalogue:Paper",
        formulas=("seqwise.lab.catalogue:paper",),
    )
    monkeypatch.setattr(catalogue, "PACKAGE", tmp_path)
    monkeypatch.setattr(catalogue, "papers", lambda: (paper,))
    docs.build(tmp_path / "site")
    page = (tmp_path / "site/papers/new-one.html").read_text(encoding="utf-8")
    for shown in (
        "New: keep i &lt; j.\n\n    s_j = sum_i A_ij",
        "from seqwise.lab.catalogue import Paper",
        "paper(slug: str) -&gt; seqwise.lab.catalogue.Paper",
        "Raises UsageError with the closest slugs",
        "Reproduction: does not hold (stale: the file has changed since)",
        "<td>loses &lt; 1 %</td><td>0.4 %</td><td>does not hold</td>",
        "passed on llama",
    ):
        assert shown in page
    row = re.sub(r"\s+", "", (tmp_path / "site/contract.html").read_text(encoding="utf-8"))
    assert "<td>llama</td><td>yes</td><td>1,2</td>" in row
