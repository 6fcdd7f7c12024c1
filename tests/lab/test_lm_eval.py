"""The harness's tasks under a method: the same numbers where nothing is changed, other ones where it is."""

import json
import socket
import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from seqwise import cli
from seqwise.core.errors import UsageError
from seqwise.lab import lm_eval as lab
from seqwise.lab.lm_eval import MethodLM
from seqwise.lab.zoo import load_model
from seqwise.methods import A2SF, Full, LazyEviction, Recent, SnapKV, TidalDecode, TokenRecycling, ZipCache

TINY = Recent(budget=6, sinks=1)
CONTEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps."
PAIRS = [
    (CONTEXT, " It dreams of hens."),
    ("Two and two", " is four"),
    (CONTEXT, " No"),
    (CONTEXT, " It wakes up late."),
    ("", "alone"),
    (CONTEXT, " It dreams of hens."),
    (CONTEXT, "!"),
    ("A space at the end ", "moves"),
]
QUESTIONS = [
    {"question": f"What comes after {word}? One of these must be right.", "choices": ["abc", "x", "longer one"],
     "gold": i % 3, "answer": "abc"}
    for i, word in enumerate(["one", "the night", "B", "a storm", "winter"])
]  # fmt: skip
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "letter": """
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_target: 0
doc_to_choice: ["A", "B", "BC"]
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "reply": """
output_type: generate_until
doc_to_text: "{{question}} Answer:"
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"reaches for the network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def folder(byte_llama):
    """A Llama whose tokens are bytes."""
    return byte_llama(num_hidden_layers=3, max_position_embeddings=200, initializer_range=0.3)


@pytest.fixture(scope="module")
def tiny(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def hflm(tiny):
    return HFLM(pretrained=tiny[0], tokenizer=tiny[1], batch_size=3)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of task files."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, text in TASKS.items():
        data = f"{{data_files: {{test: {path}/questions.jsonl}}, cache_dir: {path}/cache}}"
        head = f"task: own_{name}\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test"
        (path / f"{name}.yaml").write_text(head + text)
    return path


def instances(kind, *args):
    return [Instance(request_type=kind, doc={}, arguments=arguments, idx=i) for i, arguments in enumerate(args)]


def scored(lm, pairs=PAIRS):
    return lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)


def assert_close(found, expected):
    assert [one[1] for one in found] == [one[1] for one in expected]
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], rel=1e-6, abs=1e-4)


# log-likelihood


def test_without_a_method_it_is_the_harness(tiny, hflm):
    assert scored(MethodLM(*tiny, batch_size=3)) == scored(hflm)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("method", [Full(), A2SF(budget=1.0), TokenRecycling()], ids=str)
def test_a_method_that_changes_nothing_scores_as_the_harness(tiny, hflm, method, batch_size):
    lm = MethodLM(*tiny, method, batch_size=batch_size)
    assert_close(scored(lm), scored(hflm))
    assert not lm.acted


def test_whether_a_continuation_is_greedy(tiny, hflm):
    model, tokenizer = tiny
    ids = tokenizer(CONTEXT, return_tensors="pt").input_ids
    reply = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :])
    pairs = [(CONTEXT, reply), (CONTEXT, f"{reply}no"), (CONTEXT, f"no{reply}")]
    if len(tokenizer(reply).input_ids) == 4:  # some bytes are no text of their own
        assert scored(hflm, pairs)[0][1]
    assert_close(scored(MethodLM(*tiny, Full(), batch_size=3), pairs), scored(hflm, pairs))


@torch.no_grad()
def by_hand(model, tokenizer, method, context, continuation):
    """One continuation alone, token by token, on the cache that the method left of its context."""
    ids, gold = tokenizer(context).input_ids, tokenizer(continuation).input_ids
    with method.on(model) as run:
        out = model(input_ids=torch.tensor([ids]), use_cache=True)
        run.end_prompt()
        total = 0.0
        for token in gold:
            total += float(out.logits[0, -1].log_softmax(-1)[token])
            out = model(input_ids=torch.tensor([[token]]), cache=run.cache, use_cache=True)
    return total


@pytest.mark.parametrize(
    "method",
    [
        TINY,
        A2SF(budget=0.3, recent=2),
        SnapKV(budget=12, window=4, recent=4),
        LazyEviction(budget=20, window=3),
        TidalDecode(budget=6, start=0, correction=2),
        ZipCache(),
        Recent(budget=9) | ZipCache(),
    ],
    ids=str,
)
def test_continuations_of_one_context_do_not_touch_each_other(tiny, hflm, method):
    pairs = [pair for pair in PAIRS if pair[0] == CONTEXT]
    expected = [by_hand(*tiny, method, *pair) for pair in pairs]
    for batch_size in (1, 2, 8):
        lm = MethodLM(*tiny, method, batch_size=batch_size)
        assert [one[0] for one in scored(lm, pairs)] == pytest.approx(expected, abs=1e-3)
        assert lm.acted
    plain = [one[0] for one in scored(hflm, pairs)]
    assert max(abs(a - b) for a, b in zip(expected, plain, strict=True)) > 0.01


def test_one_prefill_per_context(tiny):
    model, _ = tiny
    rows = []
    handle = model.model.register_forward_pre_hook(lambda m, a, k: rows.append(k["input_ids"].shape), with_kwargs=True)
    try:
        scored(MethodLM(*tiny, TINY, batch_size=8), [(CONTEXT, " It"), ("Other text", " ab"), (CONTEXT, " goes")])
    finally:
        handle.remove()
    assert rows == [(1, len(CONTEXT)), *[(2, 1)] * 4, (1, len("Other text")), *[(1, 1)] * 2]


def test_what_is_too_long_is_cut_on_the_left(tiny, hflm):
    pairs = [("abc " * 60 + CONTEXT, " It dreams."), ("abc " * 60 + CONTEXT, " No"), (CONTEXT, "x" * 199)]
    assert_close(scored(MethodLM(*tiny, Full(), batch_size=2), pairs), scored(hflm, pairs))


@pytest.mark.parametrize("continuation, said", [("", "got 0"), ("x" * 201, "1 to 200 tokens, got 201 for 'xxx")])
def test_continuations_that_cannot_be(tiny, continuation, said):
    with pytest.raises(UsageError, match=said):
        scored(MethodLM(*tiny, TINY), [(CONTEXT, continuation)])


def test_nothing_stays_on_the_model(tiny):
    model, _ = tiny
    before = set(vars(model)), model.config._attn_implementation
    with pytest.raises(UsageError):
        scored(MethodLM(*tiny, TINY), [(CONTEXT, "")])
    scored(MethodLM(*tiny, TINY))
    assert (set(vars(model)), model.config._attn_implementation) == before


# rolling


def rolled(lm, *texts):
    return lm.loglikelihood_rolling(instances("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True)


def test_rolling_windows_sum_to_the_same(tiny, monkeypatch):
    texts = [CONTEXT, "a", "ab", CONTEXT[:33], CONTEXT[:34], (CONTEXT * 2)[:99], ""]  # one window, two, three
    plain, ours = HFLM(pretrained=tiny[0], tokenizer=tiny[1]), MethodLM(*tiny, Full())
    plain._max_length = ours._max_length = 33
    assert rolled(ours, *texts) == pytest.approx(rolled(plain, *texts), abs=1e-3)


def test_half_of_a_window_is_the_prompt(tiny):
    model, tokenizer = tiny
    text = CONTEXT[:41]  # with the end-of-text token in front 42 rows: 21 of them are the prompt
    head = torch.tensor([[256, *tokenizer(text[:20]).input_ids]])
    with torch.no_grad():
        own = model(head).logits.log_softmax(-1)[0, :-1].gather(1, head[0, 1:, None]).sum()
    with TINY.on(model) as run:
        total, rest = float(own), tokenizer(text[20:]).input_ids
        with torch.no_grad():
            out = model(input_ids=head, use_cache=True)
            run.end_prompt()
            for token in rest:
                total += float(out.logits[0, -1].log_softmax(-1)[token])
                out = model(input_ids=torch.tensor([[token]]), cache=run.cache, use_cache=True)
    lm = MethodLM(*tiny, TINY)
    assert rolled(lm, text) == pytest.approx([total], abs=1e-3) and lm.acted


# generation


def replied(lm, **options):
    asked = [(text, {"until": ["\n"], "max_gen_toks": 9, **options}) for text in (CONTEXT, "Two and two", "Why is it")]
    return lm.generate_until(instances("generate_until", *asked), disable_tqdm=True)


@pytest.mark.parametrize("method, batch_size", [(None, 1), (Full(), 1), (Full(), 3), (TokenRecycling(), 1)], ids=str)
def test_the_same_replies_where_nothing_is_changed(tiny, hflm, method, batch_size):
    assert replied(MethodLM(*tiny, method, batch_size=batch_size)) == replied(hflm)


def test_other_replies_where_something_is(tiny, hflm):
    lm = MethodLM(*tiny, TINY, batch_size=2)
    assert replied(lm) != replied(hflm) and lm.acted
    model, tokenizer = tiny
    with TINY.on(model):
        ids = tokenizer(CONTEXT, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=9, do_sample=False)
    assert replied(lm)[0] == tokenizer.decode(out[0, len(CONTEXT) :], skip_special_tokens=True).split("\n")[0]


# the command


def run(*args) -> int:
    """Exit code of the command line, run in this process."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(arg) for arg in args])
    return stopped.value.code or 0


def evaluated(capsys, folder, *args):
    assert run("eval", "--model", folder, "--json", *args) == 0
    return json.loads(capsys.readouterr().out)


def test_any_task_under_any_method(folder, own, tmp_path, capsys):
    tasks = ["--tasks", "own_choice,own_reply", "--tasks", own / "whole.yaml", "--include-path", own]
    plain = evaluated(capsys, folder, *tasks)
    same = evaluated(capsys, folder, *tasks, "--method", "A2SF(budget=1.0)", "--batch-size", 4)
    other = evaluated(capsys, folder, *tasks, "--method", TINY, "--out", tmp_path / "r.json", "--limit", 4)
    assert json.loads((tmp_path / "r.json").read_text()) == other
    keys = [("own_choice", "acc"), ("own_reply", "exact_match"), ("own_whole", "byte_perplexity")]
    for document, acted, n in ((plain, False, 5), (same, False, 5), (other, True, 4)):
        assert document["schema"] == "seqwise.eval/1" and document["acted"] is acted
        assert [(row["task"], row["metric"]) for row in document["rows"]] == keys
        assert {row["n"] for row in document["rows"]} == {n}
    assert [row["value"] for row in same["rows"]] == pytest.approx([row["value"] for row in plain["rows"]], rel=1e-4)
    assert plain["settings"]["method"] == "Full()" and other["settings"]["method"] == "Recent(budget=6, sinks=1)"
    assert other["settings"]["limit"] == 4 and other["versions"]["lm_eval"]
    assert [row["higher_is_better"] for row in other["rows"]] == [True, True, False]
    assert plain["rows"][0]["stderr"] > 0


def test_a_small_budget_changes_the_result(folder, own, capsys):
    whole, method = ["--tasks", own / "whole.yaml"], ["--method", "Recent(budget=2, sinks=0)"]
    plain, ours = evaluated(capsys, folder, *whole), evaluated(capsys, folder, *whole, *method)
    assert abs(ours["rows"][0]["value"] / plain["rows"][0]["value"] - 1) > 1e-3


def test_the_table(folder, own, capsys):
    assert run("eval", "--model", folder, "--tasks", own / "choice.yaml", "--method", "Recent(budget=4000)") == 0
    out = capsys.readouterr().out
    assert "own_choice" in out and "acc ↑" in out and "±" in out and "never acted" in out
    assert run("eval", "--model", folder, "--tasks", own / "choice.yaml", "--method", "Recent(budget=5)") == 0
    assert "never acted" not in capsys.readouterr().out


def test_choices_of_one_token_are_counted(folder, own, capsys):
    """The prompt's last row predicts them, so what happens to the cache afterwards cannot show."""
    document = evaluated(capsys, folder, "--tasks", own / "letter.yaml", "--method", TINY)
    plain = evaluated(capsys, folder, "--tasks", own / "letter.yaml")
    assert document["acted"] and document["rows"][0]["value"] == plain["rows"][0]["value"]
    assert document["notes"][0].startswith("10 of 15 continuations have one token") and plain["notes"] == []


def test_a_plugin(folder, own, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom seqwise.methods import Recent\n"
        "@dataclass(frozen=True)\nclass Mine(Recent):\n    pass\n"
    )
    document = evaluated(
        capsys, folder, "--tasks", own / "choice.yaml", "--plugin", tmp_path / "mine.py", "--method", "Mine(budget=5)"
    )
    assert document["acted"] and document["settings"]["method"] == "Mine(budget=5)"


# a user's mistakes


@pytest.mark.parametrize(
    "args, said",
    [
        (["--tasks", "missing.yaml"], "no task file at missing.yaml"),
        (["--tasks", "own_chioce", "--include-path", "OWN"], "unknown task 'own_chioce'"),
        (["--tasks", ","], "at least one task"),
        (["--include-path", "/no/folder"], "--include-path must be a folder with task files, got '/no/folder'"),
        (["--limit", "0"], "--limit must be a whole number >= 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be a whole number >= 1, got 0"),
        (["--method", "Nothing"], "unknown method 'Nothing'"),
        (["--method", "Recent(budget=0)"], "Recent.budget must be"),
        (["--plugin", "missing.py"], "no plugin at missing.py"),
        (["--out", "/no/folder/r.json"], "does not exist"),
        (["--model", "/no/such/folder"], "cannot load model"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, own, monkeypatch, capsys, args, said):
    whole = lab.TaskManager
    monkeypatch.setattr(
        lab,
        "TaskManager",
        lambda include_path, include_defaults: whole(include_path=include_path, include_defaults=False),
    )  # fmt: skip  (the harness's own take half a minute)
    args = [str(own) if arg == "OWN" else arg for arg in args]
    start = ([] if "--model" in args else ["--model", folder]) + (
        [] if "--tasks" in args else ["--tasks", str(own / "choice.yaml")]
    )
    assert run("eval", *start, *args) == 2
    out, err = capsys.readouterr()
    assert said in " ".join(err.split()) and out == "" and "Traceback" not in err


def test_a_task_that_cannot_be_loaded(folder, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(
        f"task: bad\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/none.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: ""\ndoc_to_target: x\ndoc_to_choice: y\n'
    )
    assert run("eval", "--model", folder, "--tasks", tmp_path / "bad.yaml") == 2
    err = capsys.readouterr().err
    assert "cannot load" in err and "bad.yaml" in err and "none.jsonl" in err


@pytest.mark.slow  # reads the harness's whole index
def test_a_close_name_is_told(own):
    with pytest.raises(UsageError, match=r"unknown task 'own_chioce'.*close: own_choice"):
        lab._tasks(["own_chioce"], str(own))


def test_a_model_that_lacks_a_part(folder, own, capsys):
    assert run("eval", "--model", folder, "--tasks", own / "choice.yaml", "--method", "FoPru") == 2
    assert "vision tower" in capsys.readouterr().err


def test_the_missing_extra_is_named(folder, own, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "seqwise.lab.lm_eval")
    monkeypatch.delattr("seqwise.lab.lm_eval")
    assert run("eval", "--model", folder, "--tasks", own / "choice.yaml") == 2
    out, err = capsys.readouterr()
    assert "pip install 'seqwise[eval]'" in err and err.count("\n") == 1 and out == ""
