import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqwise.methods.attend.attention_calibration as module
from seqwise.core.errors import UnsupportedModel, UsageError
from seqwise.core.method import Method
from seqwise.methods.attend.attention_calibration import (
    AttentionCalibration,
    accepted_heads,
    calibrate,
    calibrate_map,
    calibrated_layers,
    column_mean,
    mean_from_sums,
    sink_set,
    threshold,
)
from seqwise.testing.families import FAMILIES


def causal_map(n, seed=0, heads=2, sinks=((0, 4.0), (5, 3.0))):
    """Random causal probabilities (heads, n, n) whose columns `sinks` receive extra logits."""
    logits = torch.randn(heads, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for column, extra in sinks:
        if column < n:
            logits[..., column] += extra
    return logits.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1).float()


def reference(A, beta, tau):
    """Steps 1 to 4 in plain loops over one (n, n) map."""
    n = A.shape[-1]
    a = [sum(float(A[i, j]) for i in range(j, n)) / (n - j) for j in range(n)]
    S = [j for j in range(1, n) if a[j] > tau]
    out = A.clone()
    for i in range(1, n):
        freed = (1 - beta) * sum(float(A[i, j]) for j in S)
        rest = sum(float(A[i, u]) for u in range(n) if u not in S)
        for j in range(n):
            out[i, j] = beta * A[i, j] if j in S else A[i, j] + freed * A[i, j] / rest
    out[0] = 0.0
    out[0, 0] = 1.0
    return out, a, S


@pytest.mark.parametrize("n", [1, 7, 23])
@pytest.mark.parametrize("rule", ["absolute:0.1", "relative:5"])
def test_equals_plain_loops(n, rule):
    A = causal_map(n)
    tau = threshold(rule, n)
    out = calibrate_map(A, beta=0.4, rule=rule)
    for head in range(A.shape[0]):
        expected, a, S = reference(A[head], 0.4, tau)
        torch.testing.assert_close(column_mean(A[head]), torch.tensor(a))
        assert sink_set(column_mean(A[head]), tau).nonzero().flatten().tolist() == S
        torch.testing.assert_close(out[head], expected)
    if n == 23 and rule == "absolute:0.1":
        assert S, "the planted sink must be found, or this test compares nothing"


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 17), seed=st.integers(0, 99), beta=st.floats(0, 1))
def test_rows_keep_their_sum_and_causal_zeros(n, seed, beta):
    A = causal_map(n, seed)
    out = calibrate_map(A, beta)
    torch.testing.assert_close(out.sum(-1), torch.ones(2, n))
    assert (out >= 0).all()
    assert (out.triu(1) == 0).all()


def test_beta_one_and_an_empty_set_are_the_identity():
    A = causal_map(13)
    S = sink_set(column_mean(A), 0.1)
    assert S.any()
    torch.testing.assert_close(calibrate(A, S, beta=1.0), A, rtol=0, atol=0)
    torch.testing.assert_close(calibrate(A, torch.zeros_like(S), beta=0.4), A, rtol=0, atol=0)


def test_sinks_keep_exactly_beta_of_their_column_mean():
    A = causal_map(31)
    a = column_mean(A)
    S = sink_set(a, 0.1)
    after = column_mean(calibrate(A, S, beta=0.25))
    torch.testing.assert_close(after[S], 0.25 * a[S])
    assert (after[~S] > a[~S])[1:].any()


def test_drops_token_0_and_not_the_first_sink_found():
    A = causal_map(40, sinks=((5, 4.0), (9, 4.0)))
    a = column_mean(A)[0]
    a[0] = 0.01  # token 0 is no sink here: the first element above tau is token 5
    S = sink_set(a, 0.1)
    assert S[5] and S[9] and not S[0]


def test_threshold_is_strict_and_relative_to_the_real_length():
    assert sink_set(torch.tensor([0.5, 0.1, 0.2]), 0.1).tolist() == [False, False, True]
    assert threshold("absolute:0.15", 1000) == 0.15
    assert threshold("relative:5", 50) == 0.1
    torch.testing.assert_close(threshold("relative:5", torch.tensor([10, 50])), torch.tensor([0.5, 0.1]))


@pytest.mark.parametrize("rule", ["0.1", "absolute", "relative:-1", "relative:0", "absolute:nan", "share:1"])
def test_refuses_other_rules(rule):
    with pytest.raises(ValueError, match="threshold must be 'absolute:x' or 'relative:x'"):
        threshold(rule, 10)


@pytest.mark.parametrize("beta", [-0.1, 1.5, math.nan])
def test_refuses_beta_outside_its_range(beta):
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got"):
        calibrate(causal_map(5), torch.zeros(5, dtype=torch.bool), beta)


def test_left_padding_gives_what_the_prompt_gives_alone():
    lengths, n = [9, 14], 14
    alone = [causal_map(length, seed=length) for length in lengths]
    A = torch.rand(2, 2, n, n, generator=torch.Generator().manual_seed(1))  # garbage at padding
    live = torch.zeros(2, 1, n, dtype=torch.bool)
    for b, length in enumerate(lengths):
        A[b, :, n - length :, n - length :] = alone[b]
        live[b, :, n - length :] = True
    for rule in ("absolute:0.1", "relative:2"):
        out = calibrate_map(A, 0.4, rule, live)
        a = column_mean(A, live)
        for b, length in enumerate(lengths):
            inner = out[b, :, n - length :, n - length :]
            torch.testing.assert_close(inner, calibrate_map(alone[b], 0.4, rule))
            torch.testing.assert_close(a[b, :, n - length :], column_mean(alone[b]))
            assert (a[b, :, : n - length] == 0).all()
    torch.testing.assert_close(out[0, :, : n - 9], A[0, :, : n - 9], rtol=0, atol=0)


def test_padding_receives_nothing():
    live = torch.tensor([False, True, True, True])
    row = torch.tensor([[0.2, 0.3, 0.1, 0.4]])  # a padded key with mass, as a careless mask would leave it
    out = calibrate(row, torch.tensor([False, False, False, True]), 0.5, live)
    torch.testing.assert_close(out, torch.tensor([[0.2, 0.3 + 0.2 * 0.75, 0.1 + 0.2 * 0.25, 0.2]]))


def test_a_row_with_all_its_mass_on_sinks_stays():
    A = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.25, 0.25]])
    out = calibrate(A, torch.tensor([False, True, False]), 0.4)
    assert out[0].tolist() == [0.0, 1.0, 0.0]
    torch.testing.assert_close(out[1], torch.tensor([0.6, 0.1, 0.3]))


def test_a_tiny_recipient_takes_the_freed_mass_without_overflow():
    out = calibrate(torch.tensor([[1e-38, 1.0, 0.0]]), torch.tensor([False, True, False]), 0.4)
    torch.testing.assert_close(out, torch.tensor([[0.6, 0.4, 0.0]]))


def test_decode_row_equals_the_same_row_of_the_block():
    A = causal_map(21)
    S = sink_set(column_mean(A), 0.1)
    torch.testing.assert_close(calibrate(A, S)[:, -1:], calibrate(A[:, -1:], S))
    torch.testing.assert_close(calibrate(A[:, -1:], S).sum(-1), torch.ones(2, 1))


def test_streamed_sums_give_the_dense_mean():
    A = causal_map(19)
    colsum, count = torch.zeros(2, 19), torch.zeros(19, dtype=torch.long)
    for start in range(0, 19, 4):
        rows = torch.arange(start, min(start + 4, 19))
        colsum += A[:, rows].sum(-2)
        count += (rows[:, None] >= torch.arange(19)).sum(0)
    torch.testing.assert_close(mean_from_sums(colsum, count), column_mean(A))
    assert mean_from_sums(torch.zeros(3), torch.zeros(3)).tolist() == [0, 0, 0]


def test_sliding_window_counts_only_the_queries_that_see_the_key():
    n, w = 12, 4
    i = torch.arange(n)
    sees = (i[:, None] >= i) & (i[:, None] - i < w)
    A = sees / sees.sum(-1, keepdim=True)
    expected = [sum(float(A[q, j]) for q in range(j, min(n, j + w))) / min(w, n - j) for j in range(n)]
    torch.testing.assert_close(column_mean(A, window=w), torch.tensor(expected))


def test_half_precision_is_summed_in_fp32():
    n = 4096
    A = torch.full((n, n), 1.0 / n).tril().to(torch.float16)
    assert column_mean(A).dtype == torch.float32
    torch.testing.assert_close(column_mean(A)[0], A[:, 0].double().mean().float())
    out = calibrate(A[-1:].bfloat16(), torch.arange(n) == 7, 0.4)
    assert out.dtype == torch.bfloat16


def test_layers_and_heads():
    assert list(calibrated_layers(32)) == list(range(2, 31))
    assert list(calibrated_layers(32, spare_last=False)) == list(range(2, 32))
    assert list(calibrated_layers(2)) == []
    accuracy = torch.tensor([[0.5, 0.6, math.nan], [0.61, 0.4, 0.7]])
    assert accepted_heads(accuracy, 0.5) == ((0, 1), (1, 0), (1, 2))
    assert accepted_heads(accuracy, 0.5, margin=0.15) == ((1, 2),)


# the method on a model


class Dense:
    """Eager attention of a Llama or Mistral, its whole maps calibrated: the plain reference of the attached method."""

    def __init__(self, heads, beta=0.4, rule="absolute:0.1", window=None):
        self.heads, self.beta, self.rule, self.window = heads, beta, rule, window
        self.S = {}  # layer -> S of the prompt

    def __call__(self, module_, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        g = query.shape[1] // key.shape[1]
        k, v = key.repeat_interleave(g, 1), value.repeat_interleave(g, 1)
        mask = attention_mask[:, :, :, : k.shape[2]]
        A = (query @ k.mT * scaling + mask).softmax(-1, dtype=torch.float32)  # (B, H, q, n)
        live = (mask[:, :, -1] > -1) if self.window is None else torch.ones_like(mask[:, :, -1], dtype=torch.bool)
        at = [head for layer, head in self.heads if layer == module_.layer_idx]
        if at and query.shape[2] > 1:
            tau = threshold(self.rule, live.sum(-1, keepdim=True))
            self.S[module_.layer_idx] = sink_set(column_mean(A[:, at], live, self.window), tau, live)
            A[:, at] = calibrate_map(A[:, at], self.beta, self.rule, live, self.window)
        elif at:
            S = torch.nn.functional.pad(
                self.S[module_.layer_idx], (0, live.shape[-1] - self.S[module_.layer_idx].shape[-1])
            )
            A[:, at] = calibrate(A[:, at], S, self.beta, live)
        return (A.to(v.dtype) @ v).transpose(1, 2).contiguous(), A


OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
HEADS = ((1, 0), (2, 1), (2, 3), (3, 2))  # of four query heads that share two KV heads


def padded(family, lengths=(33, 20)):
    return family.pad_left([family.prompt(n, seed=n) for n in lengths])


@pytest.mark.parametrize("rule", ["absolute:0.1", "relative:2"])
@pytest.mark.parametrize("padding", [False, True])
def test_prompt_and_steps_equal_dense_maps(monkeypatch, rule, padding):
    import transformers.models.llama.modeling_llama as llama

    family = FAMILIES["llama"]
    model, batch = family.tiny(), padded(family) if padding else family.prompt(33)
    dense = Dense(HEADS, rule=rule)
    plain = model.generate(**batch, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(llama, "eager_attention_forward", dense)
        model.set_attn_implementation("eager")
        expected = model.generate(**batch, **OPTIONS)
    model.set_attn_implementation("sdpa")
    assert len(dense.S) == 3 and any(S.any() for S in dense.S.values())
    with AttentionCalibration(heads=HEADS, threshold=rule).on(model):
        found = model.generate(**batch, **OPTIONS)
    assert (found.scores[0] - plain.scores[0]).abs().max() > 0.01
    assert found.sequences.equal(expected.sequences)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, **family.tolerance)


def test_sliding_windows_count_the_queries_that_see_a_key(monkeypatch):
    import transformers.models.mistral.modeling_mistral as mistral

    family = FAMILIES["mistral"]
    model, batch = family.tiny(), family.prompt(33)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(mistral, "eager_attention_forward", Dense(HEADS, window=12))
        model.set_attn_implementation("eager")
        expected = model(**batch, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    with AttentionCalibration(heads=HEADS).on(model), torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).logits, expected, **family.tolerance)


def test_settings_that_change_nothing():
    family = FAMILIES["llama"]
    model, batch = family.tiny(), padded(family)
    plain = model.generate(**batch, **OPTIONS)
    for method in (AttentionCalibration().identity(), AttentionCalibration(threshold="absolute:1"),
                   AttentionCalibration(heads=())):  # fmt: skip
        with method.on(model):
            found = model.generate(**batch, **OPTIONS)
        assert found.sequences.equal(plain.sequences)
        for ours, theirs in zip(found.scores, plain.scores, strict=True):
            torch.testing.assert_close(ours, theirs, **family.tolerance)


def test_padded_prompts_equal_each_alone():
    family = FAMILIES["llama"]
    model, lengths = family.tiny(), (33, 20, 5)
    with AttentionCalibration(heads=HEADS, threshold="relative:2").on(model):
        together = model.generate(**padded(family, lengths), **OPTIONS)
        for b, n in enumerate(lengths):
            alone = model.generate(**family.prompt(n, seed=n), **OPTIONS)
            for ours, theirs in zip(together.scores, alone.scores, strict=True):
                torch.testing.assert_close(ours[b], theirs[0], **family.tolerance)


def test_sinks_of_the_attached_heads_keep_beta_of_their_mean(monkeypatch):
    family = FAMILIES["llama"]
    model, seen = family.tiny(), []

    def spy(A, S, beta, live):
        seen.append((A, S, calibrate(A, S, beta, live)))
        return seen[-1][2]

    monkeypatch.setattr(module, "calibrate", spy)
    with AttentionCalibration(beta=0.25, heads=((2, 1), (2, 2))).on(model), torch.no_grad():
        model(**family.prompt(33))
    ((A, S, after),) = seen
    assert A.shape == (1, 2, 33, 33) and S.any() and not S[..., 0].any()
    torch.testing.assert_close(column_mean(after)[S], 0.25 * column_mean(A)[S])
    torch.testing.assert_close(after.sum(-1), torch.ones(1, 2, 33))
    assert (after.triu(1) == 0).all()


def test_all_heads_of_the_calibrated_layers_without_a_list():
    found = {}
    for family in ("llama", "mistral"):
        model = FAMILIES[family].tiny()
        run = AttentionCalibration().on(model)
        found[family] = {i for i in range(4) if run.method.rewritten_heads(i, run.anatomy)}
        assert run.method.rewritten_heads(2, run.anatomy) == (0, 1, 2, 3)
    assert found == {"llama": {2}, "mistral": {2, 3}}


def test_refuses_heads_and_rules_that_do_not_exist():
    model = FAMILIES["llama"].tiny()
    for heads in (((4, 0),), ((0, 4),), ((-1, 0),)):
        with pytest.raises(UnsupportedModel, match=r"heads must be in \[0, 3\] x \[0, 3\], got"):
            AttentionCalibration(heads=heads).on(model)
    with pytest.raises(ValueError, match=r"AttentionCalibration.threshold must be 'absolute:x' or 'relative:x'"):
        AttentionCalibration(threshold="0.1")
    with pytest.raises(ValueError, match=r"AttentionCalibration.beta must be in \[0, 1\], got 2"):
        AttentionCalibration(beta=2.0)


# the search for heads

CHOICES = list(range(20, 40))
METHOD = AttentionCalibration(beta=0.0, threshold="relative:1")  # a strong change, for a model that knows nothing


def choose(model, ids):
    with torch.no_grad():
        return int(model(ids[None], use_cache=False).logits[0, -1, CHOICES].argmax())


def labelled(model, count=12):
    """Items whose right choice is what head (2, 1) alone would make of them."""
    prompts = [FAMILIES["llama"].prompt(20 + i, seed=i)["input_ids"][0] for i in range(count)]
    with replace(METHOD, heads=((2, 1),)).on(model):
        return [{"input_ids": ids, "choices": CHOICES, "label": choose(model, ids)} for ids in prompts]


def share(model, data):
    return sum(choose(model, item["input_ids"]) == item["label"] for item in data) / len(data)


def test_fit_keeps_the_heads_that_beat_the_plain_model():
    model = FAMILIES["llama"].tiny()
    data = labelled(model)
    plain, alone = share(model, data), {}
    for head in range(4):
        with replace(METHOD, heads=((2, head),)).on(model):
            alone[2, head] = share(model, data)
    assert plain < alone[2, 1] == 1.0
    fitted = METHOD.fit(model, data, seed=3)
    assert fitted.heads == tuple(head for head, accuracy in alone.items() if accuracy > plain)
    assert (fitted.beta, fitted.threshold, fitted.seed) == (0.0, "relative:1", 3)
    assert Method.parse(str(fitted)) == fitted
    assert METHOD.fit(model, data, margin=1 - plain).heads == ()
    with fitted.on(model) as run:
        assert run.method.heads == fitted.heads
    other = FAMILIES["llama"].make().eval()
    with pytest.raises(UnsupportedModel, match=r"was fitted on another model \(.*\); run fit on this model"):
        fitted.on(other)


def test_fit_goes_on_where_it_was_stopped(tmp_path):
    model, file = FAMILIES["llama"].tiny(), tmp_path / "search.json"
    data = labelled(model, 5)
    whole = METHOD.fit(model, data)
    calls = [0]

    def interrupt(*_):
        calls[0] += 1
        if calls[0] == 5 * 3 + 2:  # the plain model, two heads, and in the third
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        METHOD.fit(model, data, resume=file)
    assert METHOD.fit(model, data, resume=file) == whole
    assert calls[0] == 5 * 3 + 2 + 5 * 3, "the plain model and the two heads that were left"
    assert METHOD.fit(model, data, resume=file, budget_s=0.0) == whole, "nothing is left to try"
    handle.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


def test_fit_out_of_time_leaves_heads_out():
    model = FAMILIES["llama"].tiny()
    assert METHOD.fit(model, labelled(model, 3), budget_s=0.0).heads == ()


def test_a_search_on_something_else_is_refused(tmp_path):
    model, file = FAMILIES["llama"].tiny(), tmp_path / "search.json"
    data = labelled(model, 3)
    METHOD.fit(model, data, resume=file)
    for method, searched, items in (
        (METHOD, FAMILIES["llama"].make().eval(), data),
        (METHOD, model, data[:2]),
        (AttentionCalibration(beta=0.5), model, data),
    ):
        with pytest.raises(UsageError, match="holds a search on another model, data or setting"):
            method.fit(searched, items, resume=file)
    for broken in ("", "[]", "{"):
        file.write_text(broken)
        with pytest.raises(UsageError, match="remove it or name another file"):
            METHOD.fit(model, data, resume=file)
    with pytest.raises(UsageError, match="at least one labelled item"):
        METHOD.fit(model, [])
