"""The documentation builds without a network, no link inside it is dead, and what the guide shows is true."""

import ast
import importlib.util
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import transformers
import typer.main
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from seqwise import cli
from seqwise.lab import catalogue, zoo
from seqwise.lab.catalogue import Paper
from seqwise.testing import FAMILIES

BUILD = Path(__file__).resolve().parents[1] / "docs" / "build.py"
GUIDE = sorted((BUILD.parent / "guide").glob("*.md"))
# pages whose Python runs as it stands, with tiny models for the named ones
RUNS = ("index", "methods", "order", "probe", "eval", "images", "plan")


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


# the guide's examples


def blocks(page, language=None):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if language in (None, name)]


@pytest.fixture
def tiny_models(tmp_path, monkeypatch):
    """Whatever the guide names: a Llama and its tokenizer of bytes, a LLaVA and a processor with one prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.2, bos_token_id=0, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    family = FAMILIES["llava"]

    class Processor:
        image_token_id = family.tiny().config.image_token_id
        tokenizer = None

        def apply_chat_template(self, messages, **options):
            return family.prompt(20)

    for name, made in {
        "AutoModelForCausalLM": transformers.LlamaForCausalLM(config).eval(),
        "AutoTokenizer": transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="!", eos_token="~"),
        "AutoModelForImageTextToText": family.tiny(),
        "AutoProcessor": Processor(),
    }.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *args, made=made, **kwargs: made)
    model, tokenizer = transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    monkeypatch.setattr(zoo, "load_model", lambda: (model.from_pretrained(), tokenizer.from_pretrained()))
    monkeypatch.chdir(tmp_path)


def run_example(code: str, namespace: dict) -> int:
    """Runs a block. `# -> value` behind an expression is its value, `# raises Error: words` what a statement raises;
    returns how many such claims were checked."""
    lines, checked = code.splitlines(), 0

    def run(statements):
        nonlocal checked
        for node in statements:
            raised = re.search(r"# raises (\w+): (.*)$", lines[node.end_lineno - 1])
            value = re.search(r"# -> (.*)$", lines[node.end_lineno - 1])
            part = compile(ast.Module([node], []), "guide", "exec")
            if raised:
                with pytest.raises(Exception, match=re.escape(raised[2])) as caught:
                    exec(part, namespace)
                assert caught.typename == raised[1], ast.unparse(node)
            elif value:
                found = eval(compile(ast.Expression(node.value), "guide", "eval"), namespace)
                assert found == eval(value[1], namespace), f"{ast.unparse(node)} is {found!r}"
            else:
                exec(part, namespace)
            checked += bool(raised or value)

    run(ast.parse(code).body)
    return checked


@pytest.mark.parametrize("name", RUNS)
def test_the_guides_python_runs_and_does_what_it_says(name, tiny_models, capsys):
    page = next(page for page in GUIDE if page.stem == name)
    namespace: dict = {}
    checked = [run_example(block, namespace) for block in blocks(page, "python")]
    assert checked
    claims = sum(block.count("# -> ") + block.count("# raises ") for block in blocks(page, "python"))
    assert sum(checked) == claims, "a claim stands where none is checked"
    if name == "index":  # whose numbers are the real model's
        (shown,) = blocks(page, "")
        assert re.sub(r"[\d.]+", "N", capsys.readouterr().out) == re.sub(r"[\d.]+", "N", shown)


def test_a_wrong_claim_is_noticed():
    for code in ("1 + 1  # -> 3", "int('x')  # raises ValueError: other words", "int('x')  # raises KeyError: invalid"):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            run_example(code, {})


@pytest.mark.parametrize("page", [*GUIDE, BUILD.parents[1] / "README.md"], ids=lambda page: page.stem)
def test_the_commands_are_those_that_there_are(page):
    group = typer.main.get_command(cli.app)
    for block in blocks(page):
        for line in block.splitlines():
            if line.startswith("seqwise "):
                _, name, *words = shlex.split(line, comments=True)
                group.commands[name].make_context(name, words)
