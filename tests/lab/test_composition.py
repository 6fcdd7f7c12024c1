"""Reduce, evict and draft in one context, on the model of drawn scenes: what each stage saved adds up and is told."""

from __future__ import annotations

import pytest
import torch

from seqwise.lab.zoo import load_vlm, scenes
from seqwise.methods import (
    A2SF,
    CMAI,
    V2PE,
    VTCCLS,
    ConcentricCausalAttention,
    FoPru,
    TokenRecycling,
    TransPrune,
    ZipCache,
)


@pytest.fixture(scope="module")
def vlm():
    return load_vlm()


@pytest.fixture(scope="module")
def inputs(vlm):
    _, processor = vlm
    example = scenes.scenes(1, seed=4)[0]
    return dict(processor(images=example.images(), text=example.prompt, return_tensors="pt"))


@torch.no_grad()
def test_reduce_evict_and_draft_in_one_context(vlm, inputs):
    model, _ = vlm
    n = inputs["input_ids"].shape[1]
    method = FoPru(budget=0.5) | A2SF(budget=24) | TokenRecycling()
    with method.on(model) as run:
        out = model.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        report = run.report()
    assert out.shape[1] == n + 24
    # a drafting loop reads the prompt's last token itself
    assert report.stages["input"] == n - 1 - 32 and report.stages["prompt"] >= n - 1
    assert max(report.kept) <= 24 and report.cache_bytes < report.plain_bytes / 2
    assert 0 < report.forwards < report.decoded <= 24
    assert report.attention_work < 0.6
    for told in (f"{n - 33} input", "kept per layer", f"{report.decoded} tokens read in {report.forwards} forwards"):
        assert told in str(run)
    # the drafts change nothing: the same text as without them
    with (FoPru(budget=0.5) | A2SF(budget=24)).on(model) as run:
        plain = model.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        assert run.report().forwards == run.report().decoded == 23
    assert out.shape == plain.shape


@pytest.mark.parametrize(
    "method",
    [
        VTCCLS(budget=16) | TransPrune(budget=(0.5,), prune_after=(2,), layers=(1, 2)) | ZipCache(bits=(4, 2)),
        FoPru(budget=0.5) | V2PE(),
        FoPru(budget=0.5) | ConcentricCausalAttention(),
        VTCCLS(budget=16) | CMAI(rho=0.5),
    ],
    ids=str,
)
@torch.no_grad()
def test_reducers_compose_with_positions_attention_and_stores(vlm, inputs, method):
    model, _ = vlm
    with method.on(model) as run:
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        report = run.report()
    assert run.acted and report.stages["input"] < report.stages["prompt"]
    assert report.cache_bytes < report.plain_bytes
