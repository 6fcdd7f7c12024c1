"""Builds the documentation into a folder: `python docs/build.py site`. Needs no network.

Guide pages are the Markdown files in docs/guide. Paper pages come from papers.toml, the papers' own files and
the recorded results, so nothing is written twice.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from seqwise.lab import catalogue
from seqwise.lab.catalogue import Paper

HERE = Path(__file__).resolve().parent
WINGS = {
    "methods/reduce": "Drop or merge visual tokens",
    "methods/cache": "Evict, quantise or sparsely read the KV cache",
    "methods/attend": "Sparsify, calibrate or steer attention",
    "methods/order": "Remove or use order",
    "methods/decode": "Other ways to generate",
    "insight/explain": "Which input tokens caused this output",
    "insight/probe": "What is this model sensitive to",
    "learn/loss": "Losses",
    "learn/data": "Data",
    "learn/nn": "Architectures",
    "learn/vision": "Vision",
    "parallel": "Sequence parallelism",
}


def build(target: Path) -> None:
    """Writes the whole site below `target`, which is made if needed."""
    env = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    guide = [(path.stem, path.read_text(encoding="utf-8")) for path in sorted((HERE / "guide").glob("*.md"))]
    nav = [(name, text.splitlines()[0].removeprefix("# ")) for name, text in guide if name != "index"]

    def write(page: str, template: str, **facts: Any) -> None:
        path = target / page
        path.parent.mkdir(parents=True, exist_ok=True)
        text = env.get_template(template).render(root="../" * page.count("/"), nav=nav, **facts)
        path.write_text(text, encoding="utf-8")

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    for name, text in guide:
        title = text.splitlines()[0].removeprefix("# ")
        write(f"{name}.html", "guide.html", title=title, body=Markup(markdown.render(text)))
    wings = {wing: [paper for paper in catalogue.papers() if wing_of(paper) == wing] for wing in WINGS}
    write("papers/index.html", "papers.html", title="Papers", wings=wings, headings=WINGS)
    for paper in catalogue.papers():
        write(f"papers/{paper.slug}.html", "paper.html", title=paper.title, **paper_facts(paper))
    write("contract.html", "contract.html", title="Method contract", **contract_facts())


def wing_of(paper: Paper) -> str:
    """The part of the library that a paper belongs to, e.g. "methods/cache"."""
    return str(Path(paper.home).parent.as_posix())


def contract_facts() -> dict[str, Any]:
    """What the table method x family shows; slugs are the names that have a page."""
    passes = catalogue.contract_passes()
    families = dict.fromkeys(family for entry in passes.values() for family in entry.get("matrix", {}))
    refused = {name: entry["refused"] for name, entry in passes.items() if entry.get("refused")}
    slugs = {paper.slug for paper in catalogue.papers()}
    return {"passes": passes, "families": list(families), "refused": refused, "slugs": slugs}


def paper_facts(paper: Paper) -> dict[str, Any]:
    """What a paper's page shows: its entry, its file's docstring, its formulas, its recorded result."""
    idea = ast.get_docstring(ast.parse(paper.file.read_text(encoding="utf-8"))) if paper.file.is_file() else None
    formulas = []
    for reference in paper.formulas:
        module, name = reference.split(":")
        function = getattr(importlib.import_module(module), name)
        formulas.append((f"{name}{inspect.signature(function, eval_str=True)}", inspect.getdoc(function) or ""))
    return {"paper": paper, "idea": idea, "formulas": formulas, "result": paper.result}


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "site"))
