import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from seqwise.core.attribution import Attribution, Span, token_texts
from seqwise.core.errors import UsageError

nan = math.nan


def example(**changes):
    values = {
        "scores": torch.tensor([[0.5, -0.25, nan, 0.1], [0.1, 0.2, 0.3, 0.4]]),
        "inputs": ["The", " cat", "s", " sat"],
        "targets": [" on", " it"],
        "method": "ReAGent(probes=8)",
        "input_ids": [5, 6, 7, 8],
        "target_ids": [9, 10],
        "spans": [Span("question", 2, 4)],
        "seen": [3, 4],
        "details": {"converged": [True, False]},
    }
    return Attribution(**{**values, **changes})


def same(a, b):
    return a.to_dict() == b.to_dict()


def rendered(attribution, width=100):
    console = Console(width=width, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    console.print(attribution)
    return console.export_text(styles=True)


def test_json_round_trip(tmp_path):
    a = example()
    assert same(Attribution.from_dict(json.loads(json.dumps(a.to_dict(), allow_nan=False))), a)
    path = tmp_path / "a.json"
    a.save(path)
    a.save(path)
    assert same(Attribution.load(path), a)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"], "no temporary file stays"
    assert Attribution.load(path).scores.isnan().tolist() == a.scores.isnan().tolist()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=5), st.floats(width=32, allow_infinity=False)), min_size=1, max_size=8))
def test_any_text_and_any_float_survive(pairs):
    a = Attribution(torch.tensor([[x for _, x in pairs]]), [text for text, _ in pairs], ["t"])
    again = Attribution.from_dict(json.loads(json.dumps(a.to_dict())))
    assert again.inputs == a.inputs
    torch.testing.assert_close(again.scores, a.scores, rtol=0, atol=0, equal_nan=True)


def test_lone_surrogates_can_be_saved_and_shown(tmp_path):
    a = Attribution(torch.tensor([[1.0]]), ["\udc80"], ["\ud800"])
    a.save(tmp_path / "a.json")
    assert same(Attribution.load(tmp_path / "a.json"), a)
    a.to_html().encode()
    rendered(a).encode()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    example().save(path)
    with pytest.raises((TypeError, ValueError)):
        example(details={"x": object()}).save(path)
    assert same(Attribution.load(path), example())
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "document, message",
    [
        ([], "must have format 'seqwise.attribution/1', got 'list'"),
        ({}, "must have format .* got None"),
        ({"format": "seqwise.attribution/1"}, "must have the field 'scores'"),
        ({**example().to_dict(), "inputs": [1, 2, 3, 4]}, "expected a text, got 1"),
        ({**example().to_dict(), "inputs": ["a"]}, r"targets x inputs = \(2, 1\)"),
        ({**example().to_dict(), "scores": [["a", 0, 0, 0]] * 2}, "cannot be read"),
        ({**example().to_dict(), "spans": [3]}, "cannot be read"),
    ],
)
def test_says_what_is_wrong_with_a_document(document, message):
    with pytest.raises(UsageError, match=message):
        Attribution.from_dict(document)


def test_says_which_file_is_no_attribution(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UsageError, match=r"x\.json is no attribution"):
        Attribution.load(tmp_path / "x.json")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"scores": torch.zeros(1, 4)},
            r"must be targets x inputs = \(2, 4\), at least one each, got \(1, 4\)",
        ),
        ({"scores": torch.full((2, 4), math.inf)}, "must be finite, or NaN"),
        ({"input_ids": [1]}, "input_ids must have 4 entries, got 1"),
        ({"seen": [1, 5]}, r"seen must be in \[0, 4\]"),
        ({"seen": [1]}, "seen must have 2 entries, got 1"),
        ({"spans": [Span("x", 2, 5)]}, r"spans must lie in \[0, 4\]"),
        ({"spans": [Span("x", 0, 4, (2, 3))]}, "fill their grid"),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    with pytest.raises(UsageError, match=message):
        example(**changes)


def test_scores_are_a_copy_in_fp32():
    scores = torch.ones(2, 4, dtype=torch.bfloat16, requires_grad=True)
    a = example(scores=scores)
    assert a.scores.dtype == torch.float32 and not a.scores.requires_grad
    mine = torch.zeros(2, 4)
    a = example(scores=mine)
    mine += 1
    assert (a.scores == 0).all()


def test_top_skips_what_was_not_scored_and_prefers_the_earlier():
    a = example()
    assert a.top(10) == [0, 3, 1]
    assert a.top(2, target=1) == [3, 2]
    assert Attribution(torch.tensor([[0.5, nan, 0.5]]), ["a", "b", "c"], ["t"]).top(3) == [0, 2]


def test_words_sum_their_tokens():
    words = example(spans=[]).to_words()
    assert words.inputs == ("The", " cats", " sat")
    torch.testing.assert_close(words.scores, torch.tensor([[0.5, -0.25, 0.1], [0.1, 0.5, 0.4]]))
    assert words.seen == (2, 3) and words.input_ids is None
    assert words.targets == (" on", " it")
    unscored = Attribution(torch.tensor([[nan, nan, 1.0]]), ["a", "b", " c"], ["t"]).to_words()
    assert unscored.scores.isnan().tolist() == [[True, False]]


def test_spans_border_words_and_grids_stay_apart():
    inputs = ["a", "b", "<i>", "<i>", "<i>", "<i>", "c", "d"]
    a = Attribution(torch.ones(1, 8), inputs, ["t"], spans=[Span("image", 2, 6, (2, 2))])
    words = a.to_words()
    assert words.inputs == ("ab", "<i>", "<i>", "<i>", "<i>", "cd")
    assert words.spans == (Span("image", 1, 5, (2, 2)),)
    assert words.scores.tolist() == [[2, 1, 1, 1, 1, 2]]
    assert same(words.to_words(), words)


def test_parts_of_a_character_belong_to_its_word():
    a = Attribution(torch.tensor([[1.0, 2, 4, 8]]), ["x", "", " é", ""], ["t"])
    words = a.to_words()
    assert words.inputs == ("x", " é")
    assert words.scores.tolist() == [[1, 14]]
    assert Attribution(torch.ones(1, 2), ["", ""], ["t"]).to_words().scores.tolist() == [[2]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["", " ", "a", " a", "a ", "\n"]), min_size=1, max_size=12), st.data())
def test_words_keep_the_text_and_the_mass(inputs, data):
    n = len(inputs)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    scores = torch.rand(1, n, generator=torch.Generator().manual_seed(0))
    words = Attribution(scores, inputs, ["t"], spans=[Span("s", start, stop)]).to_words()
    assert "".join(words.inputs) == "".join(inputs)
    torch.testing.assert_close(words.scores.sum(), scores.sum())
    span = words.spans[0]
    inside = "".join(words.inputs[span.start : span.stop])
    assert inside == "".join(inputs[start:stop]) or "" in inputs


class Structure(HTMLParser):
    """Collects tags, checks that they nest, keeps the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


EVIL = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "&lt;",
    "\x1b[31m\x1b]8;;http://x\x07",
    "\u202eabc",
]


def test_html_escapes_whatever_it_shows():
    a = Attribution(
        torch.arange(5.0)[None],
        EVIL,
        [EVIL[0]],
        method=EVIL[1],
        spans=[Span(EVIL[0], 0, 2, (1, 2))],
        details={EVIL[0]: EVIL[1]},
    )
    for page in (a.to_html(title=EVIL[0]), Attribution(torch.ones(1, 5), EVIL, EVIL[:1]).to_html()):
        found = Structure(page)
        assert not {"script", "img", "link", "iframe"} & set(found.tags)
        assert not re.search(r"(src|href)\s*=\s*[\"']?http", page)
        assert "\x1b" not in page and "\u202e" not in page
        assert "&amp;lt;" in page, "an entity in the text is shown as it was written"
    assert "<script>alert(1)</script>" in Structure(page).text


def test_html_shows_all_inputs_a_grid_and_figures():
    inputs = ["see", "<i>", "<i>", "<i>", "<i>", "<i>", "<i>", " the", " cat"]
    a = Attribution(torch.arange(18.0).view(2, 9), inputs, ["x", "y"], spans=[Span("image 0", 1, 7, (2, 3))])
    page = a.to_html()
    found = Structure(page)
    assert found.tags.count("section") == 2 and found.tags.count("td") == 12 and found.tags.count("tr") == 4
    assert found.text.count(" the") >= 2
    assert 'title="17"' in page and "rgb(255,140,50)" in page
    assert 'title="not scored"' in example(seen=[]).to_html()


def test_html_shows_only_what_a_target_saw():
    page = example(details={}, spans=[]).to_html()
    first = Structure(page.split("</section>")[0] + "</section></body></html>").text
    assert "cat" in first and "sat" not in first.split("Largest")[1].split("\n", 1)[1]


def test_terminal_rendering_is_safe_and_complete():
    a = Attribution(torch.arange(5.0)[None] - 2, [*EVIL[:4], "[bold]x[/bold]"], ["[red]t"], method="m[/]")
    text = rendered(a)
    assert "\\x1b[31m" in text and "\x1b]8" not in text
    assert "[bold]x[/bold]" in text and "[red]t" in text and "m[/]" in text, "markup is text"
    assert "48;2;255;140;50" in text and "48;2;100;170;255" in text
    assert "largest:" in text


def byte_level():
    """A tokenizer whose tokens are bytes and one merged pair: characters break apart."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"Ġc": 256}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", ["a cat", "né à 東京 😀!", "\n\t x", "😀"])
def test_token_texts_join_to_the_text(text):
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert "\ufffd" not in "".join(texts)


def test_token_texts_of_broken_characters_and_without_a_tokenizer():
    tokenizer = byte_level()
    ids = tokenizer("é")["input_ids"][:1]
    assert token_texts(tokenizer, ids) == ["\ufffd"]
    assert token_texts(tokenizer, tokenizer("é cat")["input_ids"]) == ["", "é", " c", "a", "t"]
    assert token_texts(None, [3, 14]) == ["3", " 14"]
    assert token_texts(tokenizer, []) == []
