import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from seqwise.core.errors import PromptError
from seqwise.core.segments import CONTEXT, PAD, QUESTION, TEXT, Segments
from seqwise.methods.cache.a2sf import A2SF
from seqwise.methods.order.just_read_twice import (
    GatedConvolution,
    JRTModel,
    JustReadTwice,
    PrefixLinearAttention,
    SlidingWindowAttention,
    contains_answer,
    default_kinds,
    disjoint_sets,
    extraction_prompt,
    feature_map,
    jrt_loss,
    kernel,
    linear_attention_step,
    prefix_linear_attention,
    prefix_state,
    question_prompt,
    read_rows,
    reading_order,
    repeated_ids,
    training_example,
)
from seqwise.testing.families import FAMILIES

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# A. the prompt


def test_question_prompts_follow_the_official_templates():
    D, Q = " The cat sat on the mat. ", "Where did the cat sit?"
    D1 = "The cat sat on the mat."
    assert question_prompt(D, Q) == f"{Q} {D1}\n{D1} {Q}"
    assert question_prompt(D, Q, repeats=1, question_first=False) == f"{D1} {Q}", "the official baseline"
    assert question_prompt(D, Q, question_first=False) == f"{D1}\n{D1} {Q}"
    assert question_prompt(D, Q, repeats=1) == f"{Q} {D1} {Q}"
    assert question_prompt(D, Q, repeats=3, intro="The cat") == f"The cat {D1}\n{D1}\n{D1} {Q}"
    assert question_prompt("a cat", Q) == f"{Q} a cat.\na cat. {Q}", "the full stop is the template's"


def test_extraction_prompts_follow_the_official_templates():
    D, K = "Name: X12. Class: 2.", "Device class"
    assert extraction_prompt(D, K) == f"Information about Device class. {D}\n{D} Device class:"
    assert extraction_prompt(D, K, repeats=1, question_first=False) == f"{D} Device class:"
    assert extraction_prompt(D, K, repeats=3, question_first=False) == f"{D}\n{D}\n{D} Device class:"


@pytest.mark.parametrize("build", [question_prompt, extraction_prompt])
def test_the_context_is_read_at_least_once(build):
    with pytest.raises(ValueError, match="repeats must be >= 1, got 0"):
        build("a", "b", repeats=0)


def test_token_prompts_have_the_same_form():
    D, Q, sep = torch.tensor([5, 6, 7]), torch.tensor([1, 2]), torch.tensor([0])
    assert repeated_ids(D, Q).tolist() == [1, 2, 5, 6, 7, 5, 6, 7, 1, 2]
    assert repeated_ids(D, Q, question_first=False).tolist() == [5, 6, 7, 5, 6, 7, 1, 2]
    assert repeated_ids(D, Q, repeats=1, question_first=False).tolist() == [5, 6, 7, 1, 2]
    assert repeated_ids(D, Q, separator=sep).tolist() == [1, 2, 0, 5, 6, 7, 0, 5, 6, 7, 0, 1, 2]
    with pytest.raises(ValueError, match="repeats must be >= 1, got 0"):
        repeated_ids(D, Q, repeats=0)


def parts(text):
    """A prompt as text, c for a context token, q for one of the question, anything else for neither -> (n,)."""
    return torch.tensor([{"c": CONTEXT, "q": QUESTION}.get(letter, -1) for letter in text])


def read(text, **options):
    """The reading order as letters; capitals for what stands there for the first time is not needed."""
    return "".join(text[i] for i in reading_order(parts(text), **options))


def test_reading_order_by_hand():
    assert read("bccc-qqt") == "bqq-ccc-ccc-qqt"
    assert read("bcccqqt") == "bqqccccccqqt"
    assert read("bccc-qqt", question_first=False) == "bccc-ccc-qqt"
    assert read("bccc-qqt", repeats=1) == "bqq-ccc-qqt"
    assert read("bccc-qqt", repeats=3, question_first=False) == "bccc-ccc-ccc-qqt"
    assert read("bqq-ccct") == "bqq-cccccct", "a question that stands first already is not copied"
    assert read("bq-cc-qt") == "bq-cc-cc-qt"
    assert read("bcc-ct") == "bcc-ccc-ct", "one context from its first to its last token; no question"
    assert reading_order(parts("bccc-qqt")).tolist() == [0, 5, 6, 4, 1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7]


def test_a_long_context_is_cut_and_never_the_question():
    assert read("bccccc-qqt", max_context=2) == "bqq-cc-cc-qqt"
    assert read("bccccc-qqt", max_context=9) == read("bccccc-qqt")
    assert reading_order(parts("bccccc-q"), max_context=2, repeats=1, question_first=False).tolist() == [0, 1, 2, 6, 7]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2), st.integers(0, 3), st.integers(0, 3), st.integers(1, 4))
def test_every_token_is_read_and_the_switches_off_change_nothing(head, context, gap, question, tail, repeats):
    text = "b" * head + "c" * context + "-" * gap * (question > 0) + "q" * question + "t" * tail
    plain = reading_order(parts(text), repeats=1, question_first=False)
    assert plain.tolist() == list(range(len(text)))
    index = reading_order(parts(text), repeats=repeats)
    assert set(index.tolist()) == set(range(len(text)))
    letters = "".join(text[i] for i in index)
    assert letters.count("c") == repeats * context
    assert letters.count("q") == 2 * question
    assert letters.startswith("b" * head) and letters.endswith("q" * question + "t" * tail)


def test_reading_order_needs_a_context_and_a_question_beside_it():
    with pytest.raises(PromptError, match=r"marks no context; .*seqwise.prepare"):
        reading_order(parts("bqq"))
    with pytest.raises(PromptError, match="question lies inside the context"):
        reading_order(parts("ccqcc"))


def test_an_answer_counts_wherever_it_stands_and_in_any_case():
    assert contains_answer("It is Paris, of course", ["london", "PARIS"])
    assert not contains_answer("It is Paris", ["London", "Rome"])
    assert contains_answer("costs $3.50 (approx.)", ["$3.50 (APPROX.)"]), "no pattern, a text"
    assert not contains_answer("anything", [])


def marked(texts, width):
    """Segments of left-padded prompts given as letters."""
    kind, part = (torch.full((len(texts), width), value) for value in (PAD, -1))
    for b, text in enumerate(texts):
        kind[b, width - len(text) :] = TEXT
        part[b, width - len(text) :] = parts(text)
    return Segments(kind, *[torch.full_like(kind, -1)] * 6, part)


OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "method", [JustReadTwice(), JustReadTwice(repeats=3, question_first=False), JustReadTwice(max_context=3)]
)
def test_the_model_answers_the_reworded_prompt(family, method):
    family = FAMILIES[family]
    model, texts = family.tiny(), ["bcccc-qqt", "ccccccccqqqt"]
    prompts = [family.prompt(len(text), seed=i) for i, text in enumerate(texts)]
    batch = family.pad_left(prompts)
    with method.on(model) as run:
        run.bind(marked(texts, 12))
        found = model.generate(**batch, **OPTIONS)
        assert run.acted
    assert found.sequences[:, :12].equal(batch["input_ids"]), "returned texts begin with the caller's prompt"
    for b, text in enumerate(texts):
        index = reading_order(
            parts(text), repeats=method.repeats, question_first=method.question_first, max_context=method.max_context
        )
        ids = prompts[b]["input_ids"][:, index]
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
        assert found.sequences[b, 12:].equal(wanted.sequences[0, ids.shape[1] :])
        torch.testing.assert_close(found.scores[0][b], wanted.scores[0][0], **family.tolerance)


def test_the_identity_changes_nothing_and_twice_does():
    family = FAMILIES["llama"]
    model, batch = family.tiny(), family.prompt(9)
    plain = model.generate(**batch, **OPTIONS)

    def under(method):
        with method.on(model) as run:
            run.bind(marked(["bcccc-qqt"], 9))
            return model.generate(**batch, **OPTIONS)

    same = under(JustReadTwice(max_context=2).identity())
    assert same.sequences.equal(plain.sequences)
    torch.testing.assert_close(same.scores, plain.scores, **family.tolerance)
    assert (under(JustReadTwice()).scores[0] - plain.scores[0]).abs().max() > 0.01


def test_goes_with_eviction_and_needs_to_know_the_parts():
    family = FAMILIES["llama"]
    model, batch = family.tiny(), family.prompt(9)
    with (JustReadTwice() | A2SF(budget=6)).on(model) as run:
        run.bind(marked(["bcccc-qqt"], 9))
        model.generate(**batch, **OPTIONS)
        assert run.report().tokens == 17 + 4, "the prompt that was read has 17 tokens"
    with JustReadTwice().on(model), pytest.raises(PromptError, match="needs context and question apart"):
        model.generate(**batch, **OPTIONS)


def test_a_set_of_the_context_becomes_a_set_per_reading():
    facts = marked(["bcccc-qqt"], 9)
    sets, members = torch.tensor([[-1, 0, 0, 1, 1, -1, -1, -1, -1]]), torch.tensor([[-1, 0, 1, 0, 1, -1, -1, -1, -1]])
    facts = Segments(facts.type, *[facts.image] * 4, sets, members, facts.part)
    ids, read = JustReadTwice(repeats=3, question_first=False).reword(torch.arange(9)[None], facts)
    assert ids.tolist() == [[0, *[1, 2, 3, 4, 5] * 3, 6, 7, 8]]
    assert read.set.tolist() == [[-1, 0, 0, 1, 1, -1, 2, 2, 3, 3, -1, 4, 4, 5, 5, -1, -1, -1, -1]]
    assert read.member.tolist() == [[-1, 0, 1, 0, 1, -1, 0, 1, 0, 1, -1, 0, 1, 0, 1, -1, -1, -1, -1]]


@pytest.mark.parametrize("options, words", [
    ({"repeats": 0}, r"JustReadTwice.repeats must be >= 1, got 0"),
    ({"question_first": 1}, r"JustReadTwice.question_first must be True or False, got 1"),
    ({"max_context": 0}, r"JustReadTwice.max_context must be >= 1, got 0"),
])  # fmt: skip
def test_refuses_bad_settings(options, words):
    with pytest.raises(ValueError, match=words):
        JustReadTwice(**options)


def test_reads_back_what_it_writes():
    method = JustReadTwice(repeats=3, max_context=100)
    assert JustReadTwice.parse(str(method)) == method


# B. prefix linear attention


def plain_attention(q, k, v, ke, ve, mask=None, prefix_mask=None):
    """Row by row and pair by pair, in float64, with the features written out."""
    B, H, n, f = q.shape
    q, k, v, ke, ve = (x.double() for x in (q, k, v, ke, ve))

    def phi(x):
        return torch.cat([torch.ones(1).double(), x / f**0.25, torch.outer(x, x).flatten() / (2**0.5 * f**0.5)])

    y = torch.zeros_like(v)
    for b in range(B):
        for h in range(H):
            for i in range(n):
                pairs = [(k[b, h, j], v[b, h, j]) for j in range(i + 1) if mask is None or mask[b, j]]
                pairs += [
                    (ke[b, h, j], ve[b, h, j]) for j in range(ke.shape[2]) if prefix_mask is None or prefix_mask[b, j]
                ]
                weights = [phi(q[b, h, i]) @ phi(key) for key, _ in pairs]
                if pairs:
                    y[b, h, i] = sum(w * value for w, (_, value) in zip(weights, pairs, strict=True)) / sum(weights)
    return y.float()


def tensors(B, H, n, f, dv, M, seed=0):
    return (
        randn(B, H, n, f, seed=seed), randn(B, H, n, f, seed=seed + 1), randn(B, H, n, dv, seed=seed + 2),
        randn(B, H, M, f, seed=seed + 3), randn(B, H, M, dv, seed=seed + 4),
    )  # fmt: skip


def test_features_give_the_second_order_expansion_of_exp():
    q, k = randn(3, 5, 6), randn(3, 4, 6, seed=1)
    phi_q, phi_k = feature_map(q), feature_map(k)
    assert phi_q.shape == (3, 5, 1 + 6 + 36) and phi_q[..., 0].eq(1).all()
    s = q @ k.mT / math.sqrt(6)
    torch.testing.assert_close(phi_q @ phi_k.mT, 1 + s + s**2 / 2, **CLOSE)
    torch.testing.assert_close(kernel(q, k), 1 + s + s**2 / 2, **CLOSE)
    assert kernel(10 * q, 10 * k).min() > 0, "1 + s + s^2 / 2 has no real root"
    z = q[0, 0]
    torch.testing.assert_close(
        feature_map(z), torch.cat([torch.ones(1), z / 6**0.25, torch.outer(z, z).flatten() / math.sqrt(12)]), **CLOSE
    )
    assert feature_map(torch.zeros(2, 6)).equal(torch.eye(43)[:1].expand(2, -1)), "phi(0) is not 0"


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(0, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_parallel_form_equals_the_sums_pair_by_pair(n, M, f, dv, seed):
    M = min(M, n)
    q, k, v, ke, ve = tensors(2, 2, n, f, dv, M, seed)
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < 0.7
    torch.testing.assert_close(prefix_linear_attention(q, k, v, ke, ve), plain_attention(q, k, v, ke, ve), **CLOSE)
    torch.testing.assert_close(
        prefix_linear_attention(q, k, v, ke, ve, mask),
        plain_attention(q, k, v, ke, ve, mask, mask[:, :M]),
        **CLOSE,
    )


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("M", [0, 1, 100])
def test_chunks_change_nothing_and_the_recurrent_form_agrees(n, M):
    M = min(M, n)
    q, k, v, ke, ve = tensors(1, 2, n, 4, 3, M)
    y = prefix_linear_attention(q, k, v, ke, ve)
    w = (feature_map(q) @ feature_map(k).mT).tril()
    we = feature_map(q) @ feature_map(ke).mT
    whole = (w @ v + we @ ve) / (w.sum(-1) + we.sum(-1))[..., None]
    torch.testing.assert_close(y, whole, **CLOSE)
    S, z = prefix_state(ke, ve)
    assert S.shape == (1, 2, 21, 3) and z.shape == (1, 2, 21)
    steps = []
    for i in range(n):
        row, S, z = linear_attention_step(q[:, :, i], k[:, :, i], v[:, :, i], S, z)
        steps.append(row)
    torch.testing.assert_close(torch.stack(steps, 2), y, **CLOSE)
    _, S_all, z_all = read_rows(q, k, v, *prefix_state(ke, ve))
    torch.testing.assert_close((S_all, z_all), (S, z), **CLOSE)
    torch.testing.assert_close(z_all, feature_map(k).sum(2) + feature_map(ke).sum(2), **CLOSE)


def test_prefix_tokens_see_all_of_the_prefix_and_count_twice():
    q, k, v, ke, ve = tensors(1, 1, 6, 3, 2, 4)
    y = prefix_linear_attention(q, k, v, ke, ve)
    later = ve.clone()
    later[:, :, 3] += 1
    assert (prefix_linear_attention(q, k, v, ke, later) - y)[:, :, 0].abs().min() > 1e-4, "row 0 reads token 3"
    ahead = v.clone()
    ahead[:, :, 3] += 1
    changed = (prefix_linear_attention(q, k, ahead, ke, ve) - y).abs().amax(-1)[0, 0]
    assert changed[:3].eq(0).all() and changed[3:].gt(0).all(), "the causal part is causal"
    # with one and the same projection, prefix tokens of the past weigh double
    same = prefix_linear_attention(q[:, :, :1], k[:, :, :1], v[:, :, :1], k[:, :, :1], v[:, :, :1])
    torch.testing.assert_close(same, v[:, :, :1], **CLOSE)
    w = kernel(q, k)
    doubled = (w.tril() + w) @ v / (w.tril() + w).sum(-1, keepdim=True)
    torch.testing.assert_close(prefix_linear_attention(q, k, v, k, v), doubled, **CLOSE)


def test_padding_adds_nothing_to_either_sum():
    """The official code zeroes keys before the feature map, where a zero key still has weight 1."""
    q, k, v, ke, ve = tensors(2, 2, 9, 3, 4, 6)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    y = prefix_linear_attention(q, k, v, ke, ve, mask)
    for x in (k, v, ke, ve):
        x[0, :, :3] = 1000.0
    torch.testing.assert_close(prefix_linear_attention(q, k, v, ke, ve, mask)[:, :, 3:], y[:, :, 3:], **CLOSE)
    alone = prefix_linear_attention(*(x[:1, :, 3:] for x in (q, k, v, ke, ve)))
    torch.testing.assert_close(y[:1, :, 3:], alone, **CLOSE)
    assert y[0, :, :3].isfinite().all()
    k[0, :, :3] = ke[0, :, :3] = 0
    leaky = prefix_linear_attention(q, k, v, ke, ve)
    assert (leaky - y)[0, :, 3:].abs().max() > 1, "zero keys would leak"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_float32_whatever_the_models_precision(dtype):
    # a thousand equal tokens: in half precision the sums stop growing long before
    n = 1000
    q = k = torch.full((1, 1, n, 4), 0.01, dtype=dtype)
    v = torch.arange(n, dtype=torch.float32)[None, None, :, None].div(n).to(dtype)
    y = prefix_linear_attention(q, k, v, k[:, :, :0], v[:, :, :0])
    assert y.dtype == dtype
    wanted = v.float().cumsum(2) / torch.arange(1, n + 1)[:, None]
    torch.testing.assert_close(y.float(), wanted, atol=5e-3, rtol=5e-3)
    S, z = prefix_state(k, v)
    assert S.dtype == z.dtype == torch.float32
    row, S, z = linear_attention_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], S, z)
    assert row.dtype == dtype and S.dtype == torch.float32


class Largest(TorchDispatchMode):
    """The largest tensor that anything inside returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def test_memory_grows_with_the_length_and_not_with_its_square():
    n = 4096
    q, k, v, ke, ve = tensors(1, 1, n, 4, 4, 8)
    with Largest() as seen:
        prefix_linear_attention(q, k, v, ke, ve)
    assert seen.numel <= 128 * 128 + n * 4
    with Largest() as seen:
        SlidingWindowAttention(8, 2, window=16)(randn(1, n, 8))
    assert seen.numel <= 16 * n * 8


def test_gradients_are_those_of_the_plain_formula():
    inputs = [x.double().requires_grad_() for x in tensors(1, 2, 5, 2, 2, 3)]
    mask = torch.tensor([[False, True, True, True, True]])
    assert torch.autograd.gradcheck(lambda *x: prefix_linear_attention(*x, mask)[:, :, 1:], inputs)


# C. layers and the model


def left_pad(rows, width):
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = row
        mask[b, width - len(row) :] = 1
    return ids, mask


LAYERS = {
    "linear": lambda: PrefixLinearAttention(8, 2, prefix=5, feature_dim=3),
    "causal": lambda: PrefixLinearAttention(8, 2, prefix=0, feature_dim=3),
    "window": lambda: SlidingWindowAttention(8, 2, window=4),
    "conv": lambda: GatedConvolution(8),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("cut", [5, 6, 11])
def test_a_layer_goes_on_from_its_state(kind, cut):
    torch.manual_seed(0)
    layer, x = LAYERS[kind](), randn(2, 12, 8)
    whole, last = layer(x)
    y, state = layer(x[:, :cut])
    torch.testing.assert_close(y, whole[:, :cut], **CLOSE)
    for i in range(cut, 12):
        y, state = layer(x[:, i : i + 1], state=state)
        torch.testing.assert_close(y, whole[:, i : i + 1], **CLOSE)
    torch.testing.assert_close(state, last, **CLOSE)
    rows, _ = layer(x[:, 9:], state=layer(x[:, :9])[1])
    torch.testing.assert_close(rows, whole[:, 9:], **CLOSE)


@pytest.mark.parametrize("kind", LAYERS)
def test_padding_moves_tokens_and_changes_nothing(kind):
    torch.manual_seed(0)
    layer, x = LAYERS[kind](), randn(3, 12, 8)
    mask = torch.ones(3, 12, dtype=torch.bool)
    for b, pads in enumerate((7, 4, 0)):  # 5, 8 and 12 tokens: as many as the prefix, and more
        mask[b, :pads] = False
    together, state = layer(x, mask)
    step, _ = layer(x[:, :1], state=state)
    x[~mask] = 100.0
    poisoned, _ = layer(x, mask)
    for b, pads in enumerate((7, 4, 0)):
        alone, own = layer(x[b : b + 1, pads:])
        torch.testing.assert_close(together[b, pads:], alone[0], **CLOSE)
        torch.testing.assert_close(poisoned[b, pads:], alone[0], **CLOSE)
        # the next token's input is the same row for all, taken before the pads were poisoned
        torch.testing.assert_close(step[b], layer(randn(3, 12, 8)[b : b + 1, :1], state=own)[0][0], **CLOSE)


def test_a_linear_layer_projects_as_the_formula_says():
    torch.manual_seed(0)
    layer, x = PrefixLinearAttention(6, 2, prefix=3, feature_dim=2), randn(2, 5, 6)
    assert {name for name, _ in layer.named_parameters()} == {
        f"{n}.weight" for n in ("Wq", "Wk", "Wv", "Wke", "Wve", "Wo")
    }

    def heads(W, x):
        return (x @ W.weight.T).view(*x.shape[:2], 2, -1).transpose(1, 2)

    y = prefix_linear_attention(
        heads(layer.Wq, x),
        heads(layer.Wk, x),
        heads(layer.Wv, x),
        heads(layer.Wke, x[:, :3]),
        heads(layer.Wve, x[:, :3]),
    )
    torch.testing.assert_close(layer(x)[0], y.transpose(1, 2).reshape(2, 5, 6) @ layer.Wo.weight.T, **CLOSE)
    assert layer(x)[1][0].shape == PrefixLinearAttention(6, 2, prefix=0, feature_dim=2)(x)[1][0].shape == (2, 2, 7, 3)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 17])
@pytest.mark.parametrize("window", [1, 4, 20])
def test_a_window_sees_its_last_tokens_and_only_distances_matter(n, window):
    torch.manual_seed(0)
    layer, x = SlidingWindowAttention(8, 2, window=window), randn(2, n, 8)
    q, k, v = (x @ layer.Wqkv.weight.T).view(2, n, 3, 2, 4).permute(2, 0, 3, 1, 4)

    def rotate(x, shift):
        angles = (torch.arange(n) + shift)[:, None] * 10_000.0 ** (-torch.arange(2) / 2)
        pairs = torch.complex(x[..., :2], x[..., 2:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    far = torch.arange(n)[:, None] - torch.arange(n)
    hidden = (far < 0) | (far >= window)
    logits = rotate(q, 3) @ rotate(k, 3).mT / 2
    y = logits.masked_fill(hidden, -math.inf).softmax(-1) @ v
    torch.testing.assert_close(layer(x)[0], y.transpose(1, 2).reshape(2, n, 8) @ layer.Wo.weight.T, **CLOSE)


def test_a_convolution_reads_three_tokens_and_is_gated():
    torch.manual_seed(0)
    layer, x = GatedConvolution(4), randn(1, 6, 4)
    u, gate = x @ layer.Wx.weight.T, torch.nn.functional.silu(x @ layer.Wg.weight.T)
    taps = layer.taps[:, 0]
    for i in range(6):
        value = sum(u[0, i - 2 + j] * taps[:, j] for j in range(3) if i - 2 + j >= 0)
        torch.testing.assert_close(layer(x)[0][0, i], (value * gate[0, i]) @ layer.Wo.weight.T, **CLOSE)


def test_the_papers_stack():
    kinds = default_kinds(26)
    assert [i for i, kind in enumerate(kinds) if kind == "linear"] == [1, 6, 11, 16, 21]
    assert [i for i, kind in enumerate(kinds) if kind == "window"] == [2, 7, 12, 17, 22]
    assert kinds.count("conv") == 16


def tiny(prefix, kinds=3, **options):
    torch.manual_seed(0)
    return JRTModel(23, 8, 2, kinds=kinds, prefix=prefix, feature_dim=3, window=4, **options).eval()


def test_a_model_decodes_from_states_as_it_reads_in_parallel():
    model, ids = tiny(6), torch.randint(23, (2, 14), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, _ = model(ids)
        found, states = model(ids[:, :6])
        torch.testing.assert_close(found, logits[:, :6], **CLOSE)
        for i in range(6, 14):
            found, states = model(ids[:, i : i + 1], states=states)
            torch.testing.assert_close(found[:, 0], logits[:, i], **CLOSE)
    assert logits.shape == (2, 14, 23)
    assert sum(states[1][0].shape[1:]) == sum((2, 13, 4)), "the state of a layer does not grow"


def test_generation_is_the_same_for_padded_prompts_of_any_length():
    model = tiny(6)
    rows = [torch.randint(23, (n,), generator=torch.Generator().manual_seed(n)) for n in (3, 6, 9)]
    ids, mask = left_pad(rows, 9)
    together = model.generate(ids, mask, max_new_tokens=7)
    assert together.shape == (3, 16) and together[:, :9].equal(ids)
    for b, row in enumerate(rows):
        assert model.generate(row[None], max_new_tokens=7)[0, len(row) :].equal(together[b, 9:])
        # padded to the prefix by hand, as the official code does
        wide, real = left_pad([row], 12)
        assert model.generate(wide, real, max_new_tokens=7)[0, 12:].equal(together[b, 9:])
    # the prefix ends with the prompt: what is generated is read causally
    short = rows[0][None]
    for block in model.blocks:
        if isinstance(block.mixer, PrefixLinearAttention):
            block.mixer.prefix = 3
    text = model.generate(short, max_new_tokens=7)
    with torch.no_grad():
        assert model(text)[0][:, 2:-1].argmax(-1).equal(text[:, 3:])


def test_a_causal_model_has_no_prefix_weights_and_sees_no_future():
    model = tiny(0, kinds=("linear", "conv", "window"))
    assert not [name for name, _ in model.named_parameters() if "Wke" in name or "Wve" in name]
    ids = torch.arange(10)[None]
    other = ids.clone()
    other[:, 7:] = 20
    with torch.no_grad():
        assert model(ids)[0][:, :7].equal(model(other)[0][:, :7])
        both = tiny(9, kinds=("linear",))
        assert (both(ids)[0][:, :7] - both(other)[0][:, :7]).abs().min() > 1e-6


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: PrefixLinearAttention(8, 3, prefix=1), r"heads must divide d_model \(8\), got 3"),
        (lambda: PrefixLinearAttention(8, 2, prefix=-1), "prefix must be >= 0, got -1"),
        (lambda: PrefixLinearAttention(8, 2, prefix=1, feature_dim=0), "feature_dim must be >= 1, got 0"),
        (lambda: SlidingWindowAttention(6, 2), r"heads must divide d_model \(6\) into even widths, got 2"),
        (lambda: SlidingWindowAttention(8, 2, window=0), "window must be >= 1, got 0"),
        (lambda: GatedConvolution(8, width=0), "width must be >= 1, got 0"),
        (lambda: JRTModel(0, 8, 2, kinds=3, prefix=1), "vocabulary must be >= 1, got 0"),
        (lambda: JRTModel(9, 8, 2, kinds=(), prefix=1), "layers must be >= 1, got 0"),
        (lambda: JRTModel(9, 8, 2, kinds=("rnn",), prefix=1), "kinds must be among .*, got 'rnn'"),
    ],
)
def test_refuses_sizes_that_do_not_fit(build, words):
    with pytest.raises(ValueError, match=words):
        build()


# D. the loss


def test_training_examples_mask_the_prefix_and_shift_what_follows():
    tokens = torch.randint(1, 50, (400, 21), generator=torch.Generator().manual_seed(0))
    inputs, labels = training_example(tokens, 12, 99, generator=torch.Generator().manual_seed(1))
    assert inputs.shape == labels.shape == (400, 20)
    masked = inputs == 99
    assert not masked[:, 12:].any()
    assert abs(float(masked[:, :12].float().mean()) - 0.15) < 0.02
    assert inputs.masked_fill(masked, 0).equal(tokens[:, :-1].masked_fill(masked, 0)), "never another token"
    assert labels[:, :12].equal(tokens[:, :12].masked_fill(~masked[:, :12], -100)), "the token itself, not the next"
    assert labels[:, 12:].equal(tokens[:, 13:]), "position 12 predicts token 13; nothing predicts token 12"
    again = training_example(tokens, 12, 99, generator=torch.Generator().manual_seed(1))
    assert again[0].equal(inputs) and again[1].equal(labels)
    every, _ = training_example(tokens, 12, 99, probability=1.0, generator=torch.Generator())
    assert every[:, :12].eq(99).all()
    none, labels = training_example(tokens, 0, 99, generator=torch.Generator())
    assert none.equal(tokens[:, :-1]) and labels.equal(tokens[:, 1:])
    for options, words in (
        ({"prefix": 21}, r"prefix must be in \[0, 20\], got 21"),
        ({"prefix": 3, "probability": 1.5}, r"probability must be in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=words):
            training_example(tokens, mask_id=99, generator=torch.Generator(), **options)


def test_the_loss_is_next_token_plus_a_quarter_of_the_reconstruction():
    logits = randn(3, 8, 11)
    labels = torch.randint(1, 11, (3, 8), generator=torch.Generator().manual_seed(0))
    labels[:, :5] = labels[:, :5].masked_fill(torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < 0.6, -100)
    labels[0, 7] = -100
    kept = labels[:, :5] >= 0
    mlm = cross_entropy(logits[:, :5][kept], labels[:, :5][kept])
    ntp = cross_entropy(logits[:, 5:].flatten(0, 1), labels[:, 5:].flatten(), ignore_index=-100)
    torch.testing.assert_close(jrt_loss(logits, labels, 5), ntp + 0.25 * mlm)
    torch.testing.assert_close(jrt_loss(logits, labels, 5, weight=1.0), ntp + mlm)
    labels[:, :5] = -100
    torch.testing.assert_close(jrt_loss(logits, labels, 5), ntp), "a prefix without a masked token adds nothing"


def test_a_masked_token_with_id_0_counts():
    """The official code tests label > 0."""
    logits, labels = randn(1, 4, 6), torch.tensor([[0, -100, 3, 2]])
    wanted = cross_entropy(logits[0, 2:], labels[0, 2:]) + 0.25 * cross_entropy(logits[0, :1], labels[0, :1])
    torch.testing.assert_close(jrt_loss(logits, labels, 2), wanted)


# F. set disjointness


@pytest.mark.parametrize("first, second", [(4, 16), (16, 4), (1, 1), (30, 25)])
def test_disjoint_sets_share_exactly_the_answer(first, second):
    ids, labels = disjoint_sets(50, first, second, vocabulary=64, generator=torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (50, first + second + 3)
    assert labels[:, :-1].eq(-100).all()
    for row, answer in zip(ids.tolist(), labels[:, -1].tolist(), strict=True):
        a, b = row[1 : 1 + first], row[2 + first : -1]
        assert (row[0], row[1 + first], row[-1]) == (1, 2, 3)
        assert len(set(a)) == first and len(set(b)) == second and min(a + b) >= 4 and max(a + b) < 64
        assert set(a) & set(b) == {answer}
    again, _ = disjoint_sets(50, first, second, vocabulary=64, generator=torch.Generator().manual_seed(0))
    assert again.equal(ids)


def test_lists_come_from_random_halves_and_must_fit_them():
    ids, labels = disjoint_sets(300, 8, 8, vocabulary=32, generator=torch.Generator().manual_seed(0))
    assert set(ids[:, 1:9].flatten().tolist()) == set(range(4, 32)), "the halves differ from example to example"
    places = (ids[:, 10:18] == labels[:, -1:]).long().argmax(-1)
    assert set(places.tolist()) == set(range(8)), "the shared token stands anywhere"
    with pytest.raises(ValueError, match=r"first must be in \[1, 16\] with 32 ids, got 17"):
        disjoint_sets(1, 17, 4, vocabulary=32, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"second must be in \[1, 12\] with 32 ids, got 13"):
        disjoint_sets(1, 4, 13, vocabulary=32, generator=torch.Generator())
