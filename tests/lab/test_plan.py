"""`seqwise plan`: one document, what is finished survives Ctrl-C, a user's mistake is one line."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from rich.console import Console

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import MissingExtra, UnsupportedModel, UsageError
from seqwise.core.method import Method
from seqwise.lab import plan
from seqwise.lab.plan import SCHEMA, Planning, Prompts, Settings, tables
from seqwise.lab.search import Objective
from seqwise.methods.reduce.vflowopt import VFlowOpt
from seqwise.testing.families import FAMILIES

pytest.importorskip("optuna")

LLAVA = FAMILIES["llava"]
TEXT = "VFlowOpt(budget=(0.5, 0.5, 0.5), prune_at=(1, 3), t=1.2)"


def some(n: int, seed: int = 0) -> list:
    return [LLAVA.prompt(9 + i % 3, seed=seed + i) for i in range(n)]


def mine(model, processor) -> Prompts:
    return Prompts(some(3), some(3, seed=50), "prompts of a test")


@dataclass(frozen=True)
class Lavish(VFlowOpt):
    """Keeps everything where alpha is positive, whatever the budget."""

    def planned(self, point, anatomy, budget):
        found = super().planned(point, anatomy, budget)
        return replace(found, budget=(1.0, 1.0, 1.0)) if point.get("alpha", 0.0) > 0 else found


# the command


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """No model is read from disk, and nothing is kept but in the test's folder."""
    monkeypatch.setenv("SEQWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "load_vlm", lambda *args: (LLAVA.tiny(), None))


def settings(**more) -> Settings:
    return Settings(**{"method": TEXT, "budget": 0.4, "prompts": 3, "evaluations": 4, **more})


def timeless(document):
    """Without what no two runs share."""
    text = json.dumps(document, sort_keys=True)
    found = json.loads(text)
    for one in (found["uniform"], found["plan"], *found["tried"], *found["unseen"]):
        one["seconds"] = 0
    return found | {"date": 0}


def test_the_document_says_what_was_found_and_on_what(loaded, tmp_path):
    out = tmp_path / "p.json"
    planning = Planning(settings(), out=out, data=mine)
    planning.run()
    document = planning.document()
    assert json.loads(out.read_text()) | {"date": 0} == document | {"date": 0}
    assert document["schema"] == SCHEMA and document["complete"] and not planning.failed
    assert document["settings"]["method"] == str(Method.parse(TEXT)) and document["settings"]["seed"] == 42
    assert document["model"] == {
        "name": "scenes-vlm", "fingerprint": Anatomy.of(LLAVA.tiny()).fingerprint, "layers": 4,
    }  # fmt: skip
    assert document["data"]["seen"] == document["data"]["unseen"] == 3
    assert document["data"]["sha256"] == mine(None, None).sha256
    assert mine(None, None).sha256 != Prompts(some(3), some(3), "").sha256
    assert list(document["space"]) == ["r0", "r1", "t", "m", "alpha"]
    assert len(document["tried"]) == 4 and len(document["plan"]["cosines"]) == 3
    found = Method.parse(document["plan"]["method"])
    assert isinstance(found, VFlowOpt) and document["plan"]["share"] <= 0.4 * 1.02
    if document["plan"]["method"] != document["uniform"]["method"]:
        gain = document["plan"]["value"] - document["uniform"]["value"]
        assert document["gain"]["value"] == pytest.approx(gain) and document["gain"]["low"] <= gain
    assert document["unseen_gain"] is not None


def test_ctrl_c_keeps_what_is_finished_and_resume_goes_on_as_if_nothing_had_been(loaded, tmp_path, monkeypatch):
    whole = Planning(settings(), data=mine)
    whole.run()
    out, calls, evaluate = tmp_path / "p.json", [], Objective.__call__

    def counted(self, method):
        calls.append(str(method))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(self, method)

    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", counted)
        with pytest.raises(KeyboardInterrupt):
            Planning(settings(), out=out, data=mine).run()
    kept = json.loads(out.read_text())
    assert not kept["complete"] and len(kept["tried"]) == 2 and kept["uniform"] is not None and not kept["unseen"]
    calls = ["finished"] * 10
    with monkeypatch.context() as patch:
        patch.setattr(Objective, "__call__", counted)
        resumed = Planning(settings(), out=out, resume=True, data=mine)
        resumed.run()
    assert len(calls) == 10 + 2 + len(resumed.document()["unseen"])
    assert timeless(resumed.document()) == timeless(whole.document())


def test_resume_refuses_other_settings_models_and_prompts(loaded, tmp_path, monkeypatch):
    out = tmp_path / "p.json"
    Planning(settings(evaluations=1), out=out, data=mine).run()
    with pytest.raises(UsageError, match="seed was 42, now it is 7"):
        Planning(settings(evaluations=1, seed=7), out=out, resume=True, data=mine).run()
    other = Planning(
        settings(evaluations=1), out=out, resume=True, data=lambda *args: Prompts(some(3, seed=9), some(1), "others")
    )
    with pytest.raises(UsageError, match="the data's sha256 was"):
        other.run()
    monkeypatch.setattr(plan, "load_vlm", lambda *args: (changed(), None))
    with pytest.raises(UsageError, match="the model's fingerprint was"):
        Planning(settings(evaluations=1), out=out, resume=True, data=mine).run()


def changed():
    model = LLAVA.tiny()
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    return model


def shown(document) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in tables(document):
        console.print(part)
    return " ".join(console.export_text().split())


def test_the_table_shows_both_schedules_the_method_and_where_it_is_from(loaded):
    planning = Planning(settings(method="Lavish(prune_at=(1, 3), t=1.2)", evaluations=6), data=mine)
    planning.run()
    document = planning.document()
    text = shown(document)
    for words in (
        "scenes-vlm, budget 0.4, 6 tries", "uniform", document["plan"]["method"], "prompts of a test",
        document["model"]["fingerprint"], f"{document['uniform']['value']:.4f}", "saw more tokens than the budget",
    ):  # fmt: skip
        assert words in text, words
    assert "nothing has been evaluated" in shown(Planning(settings(), data=mine).document())


def test_one_prompt_and_nothing_unseen_still_make_a_plan(loaded):
    planning = Planning(settings(evaluations=1), data=lambda *args: Prompts(some(1), [], "one"))
    planning.run()
    document = planning.document()
    assert document["unseen"] == [] and document["unseen_gain"] is None
    assert "upper estimate" in shown(document)
    assert document["gain"] is None or document["gain"]["low"] is None


@pytest.mark.parametrize(
    "more, says",
    [
        ({"method": "FoPru()"}, r"FoPru\(budget=0.25\) has no stages to plan; there is a plan for .*VFlowOpt"),
        ({"method": "Nothing()"}, "unknown method 'Nothing'"),
        ({"method": "VFlowOpt(t=-1.0)"}, r"cannot use 'VFlowOpt\(t=-1\.0\)': VFlowOpt\.t must be >= 0"),
        ({"task": "/no/such.jsonl"}, "cannot read /no/such.jsonl"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_a_model_is_read(more, says):
    with pytest.raises(UsageError, match=says):
        Planning(settings(**more))


@pytest.mark.parametrize(
    "more, says",
    [
        ({"budget": 1.0}, r"--budget must be a share in \(0\.0, 1\.0\), got 1\.0"),
        ({"budget": 0.0}, r"--budget must be a share"),
        ({"prompts": 0}, "--prompts must be a whole number >= 1, got 0"),
        ({"evaluations": 0}, "--evaluations must be a whole number >= 1"),
        ({"seed": -1}, "--seed must be a whole number >= 0"),
    ],
)
def test_bad_settings_are_refused(more, says):
    with pytest.raises(UsageError, match=says):
        settings(**more)


def test_a_missing_optimiser_is_told_before_a_model_is_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(plan, "load_vlm", None)
    with pytest.raises(MissingExtra, match=r"pip install 'seqwise\[plan\]'"):
        Planning(settings(), data=mine).run()


def test_stages_that_the_model_does_not_have_are_refused(loaded):
    with pytest.raises(UnsupportedModel, match=r"prune_at must be < the model's 4 layers"):
        Planning(settings(method="VFlowOpt()"), data=mine).run()


# prompts


def test_drawn_scenes_are_the_prompts_of_vision_language_models():
    from seqwise.lab.zoo import scenes

    made = plan.prompts_of(settings(prompts=3), None, scenes.processor(), vision=True)
    assert len(made.seen) == len(made.unseen) == 3 and made.source == "drawn scenes"
    assert all(batch["input_ids"].shape[0] == 1 and "pixel_values" in batch for batch in [*made.seen, *made.unseen])
    again = plan.prompts_of(settings(prompts=3), None, scenes.processor(), vision=True)
    assert made.sha256 == again.sha256
    assert made.sha256 != plan.prompts_of(settings(prompts=3, seed=1), None, scenes.processor(), vision=True).sha256


def test_pictures_of_your_own(tmp_path):
    from PIL import Image

    from seqwise.lab.zoo import scenes

    Image.new("RGB", (48, 48), (200, 10, 10)).save(tmp_path / "red.png")
    line = {"image": "red.png", "question": "what colour is the circle ?", "answer": "red"}
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({**line, "type": f"{i % 2}"}) for i in range(5)))
    made = plan.prompts_of(settings(prompts=3, task=str(tmp_path / "own.jsonl")), None, scenes.processor(), vision=True)
    assert (len(made.seen), len(made.unseen)) == (3, 2)


def test_prose_or_lines_are_the_prompts_of_language_models(byte_llama, tmp_path):
    from seqwise.lab.zoo import load_model

    _, tokenizer = load_model(byte_llama(num_hidden_layers=1))
    made = plan.prompts_of(settings(prompts=2), None, tokenizer, vision=False)
    lengths = [batch["input_ids"].shape[1] for batch in (*made.seen, *made.unseen)]
    assert len(lengths) == 4 and all(plan.WINDOW - 40 < n <= plan.WINDOW for n in lengths)
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in ("one", "three", "five")))
    made = plan.prompts_of(settings(prompts=2, task=str(tmp_path / "own.jsonl")), None, tokenizer, vision=False)
    assert [batch["input_ids"].shape[1] for batch in (*made.seen, *made.unseen)] == [3, 5, 4]
