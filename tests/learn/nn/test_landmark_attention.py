import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import StoppingCriteria, StoppingCriteriaList, Trainer, TrainingArguments

import seqwise.learn.nn.landmark_attention as module
from seqwise.core.errors import AlreadyAttached, PromptError, UnsupportedModel, UsageError
from seqwise.core.select import top_k
from seqwise.learn.nn.landmark_attention import (
    LandmarkCollator,
    LandmarkMemory,
    chunk_start,
    group_probabilities,
    grouped_softmax,
    insert_landmarks,
    landmark_attention,
    landmark_labels,
    landmark_training,
    retrieve,
    retrieved_slots,
    stingy_slots,
)
from seqwise.methods import A2SF
from seqwise.testing import FAMILIES

LLAMA = FAMILIES["llama"]
MARK = 100  # the families' words are 1..96
SELECTIONS = ("per_token_and_head", "max_over_heads", "max_over_tokens")


def randoms(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def words(n, seed=0, batch=1):
    return torch.randint(1, 97, (batch, n), generator=torch.Generator().manual_seed(seed))


def causal(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def flags(text):
    """`|` for a landmark -> bool (n,)."""
    return torch.tensor([c == "|" for c in text])


# input


def inserted_by_hand(row, every, tail=0):
    out = []
    for i, token in enumerate(row, 1 + tail):
        out.append(token)
        if i % every == 0:
            out.append(MARK)
    return out


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(1, 7), st.booleans(), st.data())
def test_each_row_gets_its_landmarks_by_its_own_real_tokens(lengths, every, left, data):
    lengths[0] = max(lengths[0], 1)
    n = max(lengths)
    tails = data.draw(st.lists(st.integers(0, every - 1), min_size=len(lengths), max_size=len(lengths)))
    rows = [words(m, seed).tolist()[0] if m else [] for seed, m in enumerate(lengths)]
    pads = [[0] * (n - m) for m in lengths]
    ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])
    mask = (ids != 0).long()
    found = insert_landmarks(ids, MARK, every, mask, tail=torch.tensor(tails))
    assert found.landmark.equal((found.input_ids == MARK) & found.attention_mask.bool())
    width = found.input_ids.shape[1]
    expected = [inserted_by_hand(row, every, tail) for row, tail in zip(rows, tails, strict=True)]
    assert width == max(map(len, expected))
    aligned_left = not (left and any(m < n and m for m in lengths))
    for b, wanted in enumerate(expected):
        m = len(wanted)
        live = slice(0, m) if aligned_left else slice(width - m, width)
        assert found.input_ids[b, live].tolist() == wanted
        rest = torch.ones(width, dtype=torch.bool)
        rest[live] = False
        assert found.attention_mask[b].tolist() == (~rest).long().tolist()
        tokens = found.source[b][found.source[b] >= 0]
        assert ids[b][tokens].tolist() == rows[b]
        assert (found.source[b][rest] == -1).all() and (found.source[b][found.landmark[b]] == -1).all()


def test_padding_keeps_its_id_and_its_side():
    ids = torch.tensor([[7, 7, 1, 2], [3, 4, 5, 6]])
    found = insert_landmarks(ids, MARK, 2, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    assert found.input_ids.tolist() == [[7, 7, 7, 1, 2, MARK], [3, 4, MARK, 5, 6, MARK]]
    found = insert_landmarks(ids.flip(-1), MARK, 2, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]))
    assert found.input_ids.tolist() == [[2, 1, MARK, 7, 7, 7], [6, 5, MARK, 4, 3, MARK]]


@pytest.mark.parametrize("every", [0, -1, 2.0, True])
def test_refuses_a_bad_block_size(every):
    with pytest.raises(ValueError, match=r"insert_landmarks.every must be a whole number >= 1, got"):
        insert_landmarks(words(3), MARK, every)


def test_refuses_a_landmark_in_the_text_and_a_full_tail():
    with pytest.raises(UsageError, match="ids must not hold the landmark already, got 5"):
        insert_landmarks(torch.tensor([[4, 5]]), 5, 2)
    padded = insert_landmarks(torch.tensor([[5, 4]]), 5, 2, torch.tensor([[0, 1]]))  # padding may look like it
    assert padded.landmark.sum() == 0
    with pytest.raises(ValueError, match=r"tail must be in \[0, 2\), got \[2\]"):
        insert_landmarks(torch.tensor([[4, 5]]), MARK, 2, tail=torch.tensor([2]))


def test_labels_follow_the_tokens():
    ids = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 0, 0]])
    found = insert_landmarks(ids, MARK, 2, (ids != 0).long())
    assert landmark_labels(found).tolist() == [
        [11, 12, MARK, 13, 14, MARK, 15],
        [21, 22, MARK, 23, -100, -100, -100],
    ]
    own = torch.tensor([[-100, -100, 13, 14, 15], [-100, 22, 23, -100, -100]])
    assert landmark_labels(found, own, ignore_landmarks=True).tolist() == [
        [-100, -100, -100, 13, 14, -100, 15],
        [-100, 22, -100, 23, -100, -100, -100],
    ]


def test_the_collator_pads_after_inserting():
    collate = LandmarkCollator(MARK, every=2, pad_id=9)
    batch = collate([{"input_ids": [1, 2, 3]}, {"input_ids": torch.tensor([4])}])
    assert batch["input_ids"].tolist() == [[1, 2, MARK, 3], [4, 9, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, MARK, 3], [4, -100, -100, -100]]
    batch = LandmarkCollator(MARK, every=2, ignore_landmarks=True)(
        [
            {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
            {"input_ids": [4, 0], "labels": [4, -100], "attention_mask": [1, 0]},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2, MARK, 3], [4, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, -100, 3], [4, -100, -100, -100]]
    with pytest.raises(ValueError, match=r"LandmarkCollator.every must be >= 1, got 0"):
        LandmarkCollator(MARK, every=0)


# the grouped softmax


def row_by_hand(x, landmark, visible):
    """One row, group by group: weights (n,), differentiable, and the landmarks' weights by block."""
    n, a = len(x), {}
    blk = [int(landmark[:j].sum()) for j in range(n)]
    seen = [j for j in range(n) if visible[j]]
    marks = {}
    if not seen:
        return x * 0, marks
    own = max(blk[j] for j in seen)
    local = [j for j in seen if (blk[j] == own and not landmark[j]) or (landmark[j] and blk[j] < own)]
    for j, g in zip(local, x[local].softmax(-1) if local else [], strict=True):
        if landmark[j]:
            marks[blk[j]] = g
        else:
            a[j] = g
    for b in range(own):
        group = [j for j in seen if blk[j] == b and not landmark[j]]
        for j, g in zip(group, x[group].softmax(-1) if group else [], strict=True):
            a[j] = g * marks.get(b, 0)
    return torch.stack([a.get(j, x[j] * 0) for j in range(n)]), marks


def dense_by_hand(x, landmark, visible):
    return torch.stack([row_by_hand(row, landmark, seen)[0] for row, seen in zip(x, visible, strict=True)])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(0, 10_000), st.booleans())
def test_equals_the_definition_for_any_landmarks_and_any_mask(n, seed, is_causal):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n, generator=random, dtype=torch.float64) * 3
    landmark = torch.rand(n, generator=random) < 0.3
    visible = causal(n) if is_causal else torch.rand(n, n, generator=random) < 0.7
    expected = dense_by_hand(x, landmark, visible)
    found = grouped_softmax(x, landmark, visible)
    torch.testing.assert_close(found, expected)
    p = group_probabilities(x, landmark, visible)
    assert p.shape == (n, int(landmark.sum()))
    for i in range(n):
        _, marks = row_by_hand(x[i], landmark, visible[i])
        assert p[i].tolist() == pytest.approx([float(marks.get(b, 0)) for b in range(p.shape[1])])
    assert (found[:, landmark] == 0).all() and (found[~visible] == 0).all()


def regular(n, every):
    return torch.arange(n) % (every + 1) == every


@pytest.mark.parametrize("n, every", [(63, 4), (51, 50), (20, 1), (30, 7)])
def test_rows_of_regular_blocks_sum_to_1(n, every):
    x = randoms(2, 3, n, n) * 5
    weights = grouped_softmax(x, regular(n, every), causal(n))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, n))
    torch.testing.assert_close(
        1 - group_probabilities(x, regular(n, every), causal(n)).sum(-1),
        weights.masked_fill(
            ~(regular(n, every).cumsum(-1).sub(regular(n, every).long()) == own_block(n, every)[:, None]), 0
        ).sum(-1),
    )  # fmt: skip


def own_block(n, every):
    return torch.arange(n) // (every + 1)


def test_masks_the_landmark_of_the_own_block_only():
    landmark = flags("..|..|.")
    x = torch.zeros(7, 7)
    a = grouped_softmax(x, landmark, causal(7))
    half, third, sixth = 1 / 2, 1 / 3, 1 / 6
    assert a[2].tolist() == pytest.approx([half, half, 0, 0, 0, 0, 0])  # the landmark itself: its block, not itself
    assert a[3].tolist() == pytest.approx([half / 2, half / 2, 0, half, 0, 0, 0])  # first token after a landmark
    assert a[5].tolist() == pytest.approx([sixth, sixth, 0, third, third, 0, 0])
    assert a[6].tolist() == pytest.approx([sixth, sixth, 0, sixth, sixth, 0, third])


def test_gradients_are_those_of_the_softmaxes_written_out():
    landmark, visible = flags("...|..|.|..."), causal(12)
    q, k = randoms(12, 5, seed=1, dtype=torch.float64), randoms(12, 5, seed=2, dtype=torch.float64)
    v = randoms(12, 3, seed=3, dtype=torch.float64)
    grads = []
    for formula in (grouped_softmax, dense_by_hand):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = formula(leaves[0] @ leaves[1].mT, landmark, visible) @ leaves[2]
        grads.append(torch.autograd.grad((out * randoms(12, 3, seed=4)).sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert grads[0][1][landmark][:-1].abs().min() > 1e-6, "landmark keys learn through the products"
    x = randoms(4, 12, seed=5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grouped_softmax(x, landmark, visible[[2, 5, 7, 11]]), x)
    assert torch.autograd.gradcheck(lambda x: group_probabilities(x, landmark, visible[[2, 5, 7, 11]]), x)


def test_groups_far_apart_keep_their_own_scale():
    landmark, visible = flags("..|..|.."), torch.ones(1, 8, dtype=torch.bool)
    x = torch.tensor([[-900.0, -901.0, 1.0, 800.0, 799.0, 1.0, 1.0, 1.0]])
    share = torch.tensor([1.0, -1.0]).div(2).softmax(-1)  # of logits that differ by 1
    quarter = torch.tensor([0.25])
    expected = torch.cat([share / 4, quarter * 0, share / 4, quarter * 0, quarter, quarter])
    torch.testing.assert_close(grouped_softmax(x, landmark, visible)[0], expected)
    x[0, [2, 5, 6, 7]] = torch.tensor([-700.0, -700.0, -700.0, -700.0])
    torch.testing.assert_close(grouped_softmax(x, landmark, visible)[0], expected)


def test_empty_and_infinite_groups_weigh_nothing_and_nothing_is_nan():
    landmark = flags("..|..|..")
    inf = float("inf")
    x = torch.tensor(
        [
            [-inf, -inf, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # block 0 has no finite logit
            [-inf] * 8,
            [0.0] * 8,
            [0.0] * 8,
        ]
    ).requires_grad_()
    visible = torch.ones(4, 8, dtype=torch.bool)
    visible[2] = False
    visible[3] = flags("..|.....")  # a landmark alone
    weights = grouped_softmax(x, landmark, visible)
    p = group_probabilities(x, landmark, visible)
    assert weights.isfinite().all() and p.isfinite().all()
    assert weights[0].tolist() == pytest.approx([0, 0, 0, 1 / 8, 1 / 8, 0, 1 / 4, 1 / 4])
    assert (weights[1:] == 0).all()
    (weights.sum() + p.sum()).backward()
    assert x.grad.isfinite().all()


def test_without_landmarks_it_is_softmax():
    x = randoms(3, 17, 17)
    none = torch.zeros(17, dtype=torch.bool)
    expected = x.masked_fill(~causal(17), float("-inf")).softmax(-1)
    torch.testing.assert_close(grouped_softmax(x, none, causal(17)), expected)
    assert group_probabilities(x, none, causal(17)).shape == (3, 17, 0)


def test_a_block_whose_landmark_weighs_nothing_can_go():
    landmark = flags("...|...|...|..")
    x = randoms(1, 14, seed=3)
    x[0, 7] = float("-inf")  # the landmark of block 1
    whole = grouped_softmax(x, landmark, torch.ones(1, 14, dtype=torch.bool))
    stay = [0, 1, 2, 3, 8, 9, 10, 11, 12, 13]
    without = grouped_softmax(x[:, stay], landmark[stay], torch.ones(1, 10, dtype=torch.bool))
    torch.testing.assert_close(whole[:, stay], without)
    assert (whole[:, 4:8] == 0).all()


def test_half_precision_logits_are_weighed_in_float32():
    x = randoms(9, 40) * 4
    half = grouped_softmax(x.bfloat16(), regular(40, 3), causal(40)[-9:])
    assert half.dtype == torch.bfloat16
    expected = grouped_softmax(x.bfloat16().float(), regular(40, 3), causal(40)[-9:])
    torch.testing.assert_close(half.float(), expected, atol=0, rtol=2**-8)


# attention in blocks of rows


def attention_by_hand(q, k, v, landmark, live=None, scaling=None):
    B, H, r, D = q.shape
    n, g = k.shape[2], H // k.shape[1]
    out = torch.zeros(B, H, r, v.shape[-1], dtype=v.dtype)
    for b in range(B):
        visible = causal(n)[n - r :] & (torch.ones(n, dtype=torch.bool) if live is None else live[b])
        for h in range(H):
            x = q[b, h] @ k[b, h // g].mT * (D**-0.5 if scaling is None else scaling)
            out[b, h] = dense_by_hand(x, landmark[b], visible) @ v[b, h // g]
    return out


@pytest.mark.parametrize("rows", [1, 5, 128])
@pytest.mark.parametrize("r, n", [(13, 13), (6, 13)])
def test_attention_equals_the_dense_formula_with_its_gradients(monkeypatch, rows, r, n):
    monkeypatch.setattr(module, "_ROWS", rows)
    q, k, v = randoms(2, 4, r, 3, seed=1), randoms(2, 2, n, 3, seed=2), randoms(2, 2, n, 5, seed=3)
    landmark = torch.stack([flags("...|...|...|."), flags("....|...|...|")])
    live = torch.ones(2, n, dtype=torch.bool)
    live[1, 0] = False
    found = []
    for attend in (landmark_attention, attention_by_hand):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = attend(*leaves, landmark, live, scaling=0.7)
        found.append([out, *torch.autograd.grad((out * randoms(2, 4, r, 5, seed=4)).sum(), leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(landmark_attention(q, k, v, landmark, live, scaling=0.7), found[0][0])


def test_the_default_scale_is_that_of_the_head_width():
    q = randoms(1, 1, 6, 4)
    landmark = flags("..|...")[None]
    torch.testing.assert_close(landmark_attention(q, q, q, landmark), attention_by_hand(q, q, q, landmark))


def test_nothing_of_n_by_n_is_kept_for_the_backward_pass(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 16)
    n = 130
    q, k, v = (randoms(1, 2, n, 8, seed=s).requires_grad_() for s in range(3))
    kept, formed = [], []
    original = module.grouped_softmax
    monkeypatch.setattr(module, "grouped_softmax", lambda x, *rest: formed.append(x.numel()) or original(x, *rest))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = landmark_attention(q, k, v, regular(n, 7)[None])
    assert max(kept, default=0) <= q.numel()
    assert len(formed) == 9 and max(formed) <= 2 * 16 * n
    out.sum().backward()
    assert len(formed) == 18 and max(formed) <= 2 * 16 * n and k.grad.isfinite().all()


def test_dropout_repeats_in_the_backward_pass():
    q, k, v = (randoms(1, 2, 20, 4, seed=s) for s in range(3))
    v.requires_grad_()
    torch.manual_seed(0)
    out = landmark_attention(q, k, v, regular(20, 4)[None], dropout=0.5)
    grad = torch.autograd.grad(out.sum(), v)[0]
    # out is linear in v: its sum is <grad, v> only if both passes dropped the same weights
    torch.testing.assert_close((grad * v).sum(), out.sum())
    with torch.no_grad():
        assert not out.allclose(landmark_attention(q, k, v, regular(20, 4)[None]))


# training


def whole(model, ids, every=8, **kwargs):
    """Logits of the text with landmarks, at each token those that predict the next real one: (B, n, V)."""
    found = insert_landmarks(ids, MARK, every)
    with landmark_training(model, MARK), torch.no_grad():
        logits = model(found.input_ids, **kwargs).logits
    rows = zip(logits, found.landmark, found.source, strict=True)
    return torch.stack([row[predicting(landmark, source)] for row, landmark, source in rows])


def predicting(landmark, source):
    """Columns whose logits predict the next real token, per real token."""
    n = len(source)
    return [j + (j + 1 < n and bool(landmark[j + 1])) for j in range(n) if source[j] >= 0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "neox", "gpt2"])
def test_a_model_under_training_attends_by_the_formula_and_is_restored(monkeypatch, family):
    model = FAMILIES[family].tiny()
    ids = words(13)
    plain = model(ids).logits
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    found = insert_landmarks(ids, MARK, 4)
    with landmark_training(model, MARK):
        without = model(ids).logits
        logits = model(found.input_ids).logits
        monkeypatch.setattr(
            module, "landmark_attention", lambda q, k, v, m, live, scaling, dropout: attention_by_hand(
                q, k, v, m, live, scaling)
        )  # fmt: skip
        by_hand = model(found.input_ids).logits
    torch.testing.assert_close(without, plain, **FAMILIES[family].tolerance)
    torch.testing.assert_close(logits, by_hand, **FAMILIES[family].tolerance)
    assert (logits - model(found.input_ids).logits).abs().max() > 0.01
    assert model(ids).logits.equal(plain)
    assert all(
        a is b.config for a, b in zip(configs, [m for m in model.modules() if hasattr(m, "config")], strict=True)
    )
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_left_padded_windows_give_what_each_gives_alone():
    model = LLAMA.tiny()
    rows = [words(9, 1), words(21, 2)]
    ids = torch.cat([torch.nn.functional.pad(row, (21 - row.shape[1], 0)) for row in rows])
    found = insert_landmarks(ids, MARK, 4, (ids != 0).long())
    with landmark_training(model, MARK), torch.no_grad():
        together = model(found.input_ids, attention_mask=found.attention_mask).logits
        for b, row in enumerate(rows):
            alone = model(insert_landmarks(row, MARK, 4).input_ids).logits[0]
            torch.testing.assert_close(together[b, -len(alone) :], alone, **LLAMA.tolerance)


def test_gradients_agree_with_gradient_checkpointing_and_reach_the_landmark():
    ids = insert_landmarks(words(22), MARK, 5).input_ids
    grads = []
    for checkpointing in (False, True):
        model = LLAMA.tiny().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        with landmark_training(model, MARK):
            model(ids, labels=ids).loss.backward()
            model(ids.flip(-1), use_cache=False)  # a later forward does not disturb
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)
    assert grads[0]["model.embed_tokens.weight"][MARK].abs().max() > 0


def test_two_forwards_before_their_backward_keep_their_own_landmarks():
    batches = [insert_landmarks(words(22, seed), MARK, every).input_ids for seed, every in ((1, 3), (2, 6))]
    grads = []
    for apart in (True, False):
        model = LLAMA.tiny().train()
        model.activation_checkpointing_enable()
        with landmark_training(model, MARK):
            if apart:
                for ids in batches:
                    model(ids, labels=ids).loss.backward()
            else:
                sum(model(ids, labels=ids).loss for ids in batches).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_takes_real_steps(tmp_path, checkpointing):
    model = LLAMA.tiny()
    before = copy.deepcopy(model.state_dict())
    dataset = [{"input_ids": words(20 + i, i)[0].tolist()} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        activation_checkpointing=checkpointing, disable_tqdm=True, save_strategy="no", logging_steps=1, seed=0,
    )  # fmt: skip
    collate = LandmarkCollator(MARK, every=8)
    seen = []
    original = module.landmark_attention

    def spy(query, key, value, landmark, live, **kwargs):
        seen.append((landmark.sum().item(), query.requires_grad))
        return original(query, key, value, landmark, live, **kwargs)

    with pytest.MonkeyPatch.context() as patch, landmark_training(model, MARK):
        patch.setattr(module, "landmark_attention", spy)
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=dataset, eval_dataset=dataset[:4])
        result = trainer.train()
        evaluated = trainer.evaluate()
    assert result.global_step == 2 and torch.isfinite(torch.tensor(evaluated["eval_loss"]))
    assert len(seen) >= 2 * 4 and all(count >= 8 for count, _ in seen) and any(grad for _, grad in seen)
    changed = [name for name, p in model.state_dict().items() if not p.equal(before[name])]
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    batch = collate(dataset[:4])
    with landmark_training(model, MARK), torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert evaluated["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_refuses_what_it_cannot_train():
    for family, reason in (("gemma2", "full attention"), ("mistral", "full attention"), ("llava", "text model"),
                           ("qwen25_vl", "1-D|text model|one position")):  # fmt: skip
        if family in FAMILIES:
            with pytest.raises(UnsupportedModel, match=reason), landmark_training(FAMILIES[family].tiny(), MARK):
                pass
    model = LLAMA.tiny()
    for bad in (101, -1, True):
        with pytest.raises(ValueError, match=rf"landmark_id must be in \[0, 101\), got {bad}"):
            landmark_training(model, bad).__enter__()
    ids = words(6)
    with landmark_training(model, MARK):
        with pytest.raises(AlreadyAttached, match="already runs under landmark_training"):
            landmark_training(model, MARK).__enter__()
        with pytest.raises(PromptError, match="needs input_ids, got embeddings"):
            model(inputs_embeds=model.get_input_embeddings()(ids))
        with pytest.raises(PromptError, match="needs whole sequences, got 1 tokens on a cache"):
            model(ids[:, :1], cache=model(ids, use_cache=True).cache)
        with pytest.raises(PromptError, match="cannot tell packed sequences apart"):
            model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
        with pytest.raises(PromptError, match=r"attention_mask must be 2-D .* got 4 dimensions"):
            model(ids, attention_mask=torch.ones(1, 1, 6, 6))
    with A2SF(budget=4).on(model), pytest.raises(AlreadyAttached, match="already runs under A2SF"):
        landmark_training(model, MARK).__enter__()
    plain = model(ids).logits
    with pytest.raises(RuntimeError, match="mine"), landmark_training(model, MARK):
        raise RuntimeError("mine")
    assert model(ids).logits.equal(plain)


# the position map and the choice of blocks


def test_stingy_slots_by_hand():
    count = torch.tensor([0, 1, 2, 3, 6])
    assert stingy_slots(count, 2, 6).tolist()[1][:1] == [0]
    assert stingy_slots(count, 2, 6).tolist()[2][:2] == [0, 1]
    assert stingy_slots(count, 2, 6).tolist()[3][:3] == [0, 1, 2]
    assert stingy_slots(count, 2, 6).tolist()[4] == [0, 0, 0, 0, 1, 2]
    picked = torch.tensor([[0, 3], [0, 5], [4, 5], [1, 4]]).view(4, 1, 1, 2)
    assert retrieved_slots(picked, torch.full((4,), 6), 2).flatten(1).tolist() == [[0, 1], [0, 2], [1, 2], [0, 2]]
    assert retrieved_slots(torch.tensor([[0, 1]]), torch.tensor([2]), 2).tolist() == [[0, 1]]
    assert chunk_start(count, torch.tensor([4, 0, 1, 0, 3]), 2, 8).tolist() == [4, 9, 19, 27, 30]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 6), st.data())
def test_blocks_stay_apart_and_behind_them_the_chunk_begins(count, k, every, data):
    k_kept = min(k, count)
    picked = sorted(data.draw(st.permutations(range(count)))[:k_kept])
    n = torch.tensor([count])
    slots = retrieved_slots(torch.tensor([picked]), n, k)[0].tolist()
    start = int(chunk_start(n, torch.tensor([0]), k, every)[0])
    assert slots == sorted(set(slots)) and (slots[-1] + 1) * (every + 1) <= start <= (k + 1) * (every + 1)
    scored = stingy_slots(n, k, count)[0].tolist()
    assert scored[-k_kept:] == list(range(start // (every + 1) - k_kept, start // (every + 1)))


def test_each_selection_takes_the_best_blocks_of_its_own_unit():
    B, H, Hkv, T, N, D, k = 2, 4, 2, 3, 7, 5, 2
    q, marks = randoms(B, H, T, D, seed=1) * 2, randoms(B, Hkv, N, D, seed=2) * 2
    count = torch.tensor([7, 4])
    live = torch.arange(N) < count[:, None]
    real = torch.tensor([[True] * 3, [True, True, False]])
    p = torch.full((B, H, T, N), -1.0)
    for b in range(B):
        for h in range(H):
            n = int(count[b])
            p[b, h, :, :n] = (q[b, h] @ marks[b, h // 2, :n].mT * D**-0.5).softmax(-1)

    def best(scores):
        return sorted(sorted(range(N), key=lambda i: -scores[i])[:k])

    each = retrieve(q, marks, live, k)
    rows = retrieve(q, marks, live, k, "max_over_heads", scaling=D**-0.5)
    heads = retrieve(q, marks, live, k, "max_over_tokens", real=real)
    assert (each.shape, rows.shape, heads.shape) == ((B, Hkv, T, k), (B, 1, T, k), (B, Hkv, 1, k))
    for b in range(B):
        for t in range(T):
            assert rows[b, 0, t].tolist() == best(p[b, :, t].amax(0).tolist())
            for h in range(Hkv):
                assert each[b, h, t].tolist() == best(p[b, 2 * h : 2 * h + 2, t].amax(0).tolist())
        for h in range(Hkv):
            scores = p[b, 2 * h : 2 * h + 2][:, real[b]].amax((0, 1))
            assert heads[b, h, 0].tolist() == best(scores.tolist())
    few = retrieve(q, marks, torch.arange(N) < torch.tensor([[1], [0]]), 3)
    assert (few[0, ..., 0] == 0).all() and (few[0, ..., 1:] >= 1).all()


# reading


def turned(x, position, inv_freq):
    """R(position) x for one vector (D,), halves paired."""
    angle = position * inv_freq
    a, b = x.chunk(2)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


class Plain(LandmarkMemory):
    """Token by token, head by head, from lists: what a memory must compute."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.texts = [[] for _ in self.picked]  # per layer (bare keys (Hkv, D), values) of everything read
        self.highest = 0

    def _attend(self, layer, chunk, query, key, value, scaling):
        _, H, T, D = query.shape
        Hkv, w, text = key.shape[1], self.every + 1, self.texts[layer]
        f = self.model.model.rotary_emb.inv_freq
        blocks = [text[i * w : i * w + w] for i in range(len(text) // w)][-self.blocks :]
        tail, N, k = text[len(text) // w * w :], len(blocks), self.k
        start = min(N, k + 1) * w + len(tail)
        assert chunk.positions[0].tolist() == list(range(start, start + T))
        self.highest = max(self.highest, start + T)
        p = torch.zeros(H, T, max(N, 1))
        for h in range(H):
            for t in range(T):
                scores = []
                for i, block in enumerate(blocks):
                    slot = max(0, i - (N - k) + 1) if k < N else i
                    scores.append(query[0, h, t] @ turned(block[-1][0][h // (H // Hkv)], slot * w + w - 1, f) * scaling)
                if N:
                    p[h, t] = torch.stack(scores).softmax(-1)
        out = torch.zeros(1, H, T, D)
        for h in range(H):
            kv = h // (H // Hkv)
            group = list(range(kv * (H // Hkv), (kv + 1) * (H // Hkv)))
            for t in range(T):
                unit = {
                    "per_token_and_head": p[group, t].amax(0),
                    "max_over_heads": p[:, t].amax(0),
                    "max_over_tokens": p[group].amax((0, 1)),
                }[self.selection]
                chosen = top_k(unit, k).tolist() if N else []  # equal tokens at one slot tie up to rounding
                keys, values, marks = [], [], []
                for r, i in enumerate(chosen):
                    shift = 1 if k < N and i >= N - k else 0
                    for place, (bare, v) in enumerate(blocks[i]):
                        keys.append(turned(bare[kv], (r + shift) * w + place, f))
                        values.append(v[kv])
                        marks.append(place == w - 1)
                for place, (bare, v) in enumerate(tail):
                    keys.append(turned(bare[kv], start - len(tail) + place, f))
                    values.append(v[kv])
                    marks.append(False)
                for j in range(t + 1):
                    keys.append(key[0, kv, j])
                    values.append(value[0, kv, j])
                    marks.append(bool(chunk.flag[0, j]))
                x = torch.stack(keys) @ query[0, h, t] * scaling
                a, _ = row_by_hand(x, torch.tensor(marks), torch.ones(len(x), dtype=torch.bool))
                out[0, h, t] = a @ torch.stack(values)
        return out

    def _store(self, layer, chunk, key, value):
        f = self.model.model.rotary_emb.inv_freq
        for t in range(key.shape[2]):
            bare = torch.stack([turned(x, -chunk.positions[0, t], f) for x in key[0, :, t]])
            self.texts[layer].append((bare, value[0, :, t]))


def shallow(family=LLAMA, layers=2):
    model = family.tiny()
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    return model


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("every, k, blocks, chunk", [(4, 2, 99, 8), (3, 1, 3, 5)])
def test_reading_equals_the_algorithm_written_out(monkeypatch, selection, every, k, blocks, chunk):
    monkeypatch.setattr(module, "_ROWS", 3)
    model, ids = shallow(), words(37)
    options = {"every": every, "k": k, "selection": selection, "blocks": blocks, "chunk": chunk}
    ours, plain = LandmarkMemory(model, MARK, **options), Plain(model, MARK, **options)
    torch.testing.assert_close(ours.read(ids), plain.read(ids), **LLAMA.tolerance)
    assert plain.highest <= (k + 1) * (every + 1) + every + chunk + chunk // every
    held = ours._stores[0].keys
    assert held.shape[2] <= blocks + 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "neox"])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_with_no_more_blocks_than_k_reading_in_chunks_is_reading_at_once(family, selection):
    model, ids = FAMILIES[family].tiny(), words(37, batch=2)
    expected = whole(model, ids)
    for chunk in (5, 8, 16, 40):
        memory = LandmarkMemory(model, MARK, every=8, k=5, chunk=chunk, selection=selection)
        torch.testing.assert_close(memory.read(ids), expected, **FAMILIES[family].tolerance)
        assert memory.length.tolist() == [41, 41]


def test_a_text_can_be_read_in_parts_that_end_inside_of_blocks():
    model, ids = LLAMA.tiny(), words(37)
    expected = whole(model, ids)
    memory = LandmarkMemory(model, MARK, every=8, k=5)
    parts = [memory.read(part) for part in ids.split([3, 6, 1, 14, 13], 1)]
    # the last token of a part knows nothing of a landmark to come, unless it ends the block
    torch.testing.assert_close(torch.cat(parts, 1), expected, **LLAMA.tolerance)


def test_rows_of_a_batch_read_as_each_alone():
    model = LLAMA.tiny()
    rows = [[words(29, 1), words(9, 2)], [words(6, 3), words(17, 4)], [words(40, 5), words(2, 6)]]
    for selection in SELECTIONS:
        options = {"every": 4, "k": 2, "chunk": 8, "blocks": 4, "selection": selection}
        together = LandmarkMemory(model, MARK, **options)
        alone = [LandmarkMemory(model, MARK, **options) for _ in rows]
        for turn, left in ((0, True), (1, False)):
            parts = [row[turn] for row in rows]
            n = max(part.shape[1] for part in parts)
            sides = [(n - part.shape[1], 0) if left else (0, n - part.shape[1]) for part in parts]
            ids = torch.cat([torch.nn.functional.pad(part, side) for part, side in zip(parts, sides, strict=True)])
            logits = together.read(ids, (ids != 0).long())
            assert (logits[ids == 0] == 0).all()
            for b, part in enumerate(parts):
                found = alone[b].read(part)[0]
                torch.testing.assert_close(logits[b][ids[b] != 0], found, **LLAMA.tolerance)
                assert together.length[b] == alone[b].length[0]


def test_keeps_the_logits_that_were_asked_for_from_all_windows():
    model, ids = LLAMA.tiny(), words(30, batch=2)
    logits = LandmarkMemory(model, MARK, every=4, chunk=8).read(ids)
    assert logits.shape == (2, 30, 101) and (logits.abs().amax(-1) > 0).all()
    for keep in (1, 7, 13, 99):
        last = LandmarkMemory(model, MARK, every=4, chunk=8).read(ids, logits_to_keep=keep)
        torch.testing.assert_close(last, logits[:, -keep:], rtol=0, atol=1e-6)


def test_forgets_the_oldest_blocks_and_says_which_it_fetched():
    model, ids = LLAMA.tiny(), words(60)
    memory = LandmarkMemory(model, MARK, every=4, k=3, blocks=3, chunk=4, selection="max_over_tokens")
    assert memory.length is None and memory.picked == [None] * 4
    memory.read(ids[:, :4])
    assert memory.picked == [None] * 4
    memory.read(ids[:, 4:8])
    assert [p.tolist() for p in memory.picked] == [[[[[0]], [[0]]]]] * 4
    memory.read(ids[:, 8:])
    assert [p.tolist() for p in memory.picked] == [[[[[11, 12, 13]], [[11, 12, 13]]]]] * 4
    other = LandmarkMemory(model, MARK, every=4, k=3, blocks=99, chunk=4, selection="max_over_tokens")
    other.read(ids)
    assert any(p.min() < 11 for p in other.picked), "with more room older blocks are worth fetching"


def test_positions_stay_inside_the_trained_length():
    model, seen = LLAMA.tiny(), []
    model.model.rotary_emb.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    LandmarkMemory(model, MARK, every=4, k=2, chunk=8).read(words(400))
    assert len(seen) == 50 and max(seen) == 3 * 5 + 10 - 1


def test_half_precision_reads_about_the_same():
    model, ids = LLAMA.tiny(), words(60)
    exact = LandmarkMemory(model, MARK, every=4, k=20).read(ids)
    rough = LandmarkMemory(model.bfloat16(), MARK, every=4, k=20, chunk=8).read(ids)
    assert rough.dtype == torch.bfloat16 and rough.isfinite().all()
    assert (rough.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def greedy_by_hand(model, ids, steps, every):
    for _ in range(steps):
        logits = whole(model, ids, every)[:, -1]
        logits[:, MARK] = float("-inf")
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


def test_generates_what_whole_sequences_with_landmarks_predict():
    model, ids = LLAMA.tiny(), words(13, batch=2)
    expected = greedy_by_hand(model, ids, 12, 4)
    memory = LandmarkMemory(model, MARK, every=4, k=9, chunk=4)
    assert memory.generate(ids, max_new_tokens=12, do_sample=False).equal(expected)
    assert memory.length.tolist() == [31, 31]  # 25 tokens, 6 landmarks
    # the memory holds all that was returned: a next turn goes on from there
    more = words(3, 9, batch=2)
    expected = greedy_by_hand(model, torch.cat([expected, more], 1), 6, 4)
    assert memory.generate(more, max_new_tokens=6, do_sample=False).equal(expected[:, -9:])


def test_a_padded_batch_generates_what_each_prompt_does():
    model, rows = LLAMA.tiny(), [words(30, 1), words(11, 2)]
    ids = torch.cat([torch.nn.functional.pad(row, (30 - row.shape[1], 0)) for row in rows])
    options = {"every": 4, "k": 2, "chunk": 8}
    found = LandmarkMemory(model, MARK, **options).generate(ids, (ids != 0).long(), max_new_tokens=15, do_sample=False)
    assert found.shape == (2, 45) and found[:, :30].equal(ids)
    for b, row in enumerate(rows):
        alone = LandmarkMemory(model, MARK, **options).generate(row, max_new_tokens=15, do_sample=False)
        assert found[b, 30:].equal(alone[0, -15:])


def test_never_emits_a_landmark_however_probable():
    model = LLAMA.tiny()
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(101))
    head.bias.data[MARK] = 1e4
    plain = model.generate(words(9), max_new_tokens=4, do_sample=False)
    assert (plain[:, -4:] == MARK).all(), "a model that never wants to would prove nothing"
    for sample in (False, True):
        torch.manual_seed(0)
        found = LandmarkMemory(model, MARK, every=4).generate(words(9), max_new_tokens=12, do_sample=sample)
        assert (found != MARK).all() and found.shape == (1, 21)


class Put:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ended = True


class After(StoppingCriteria):
    """Row b ends once it has 9 + b tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= 9 + b for b in range(len(input_ids))])


def test_transformers_options_work():
    model, ids = LLAMA.tiny(), words(7, batch=3)
    free = LandmarkMemory(model, MARK, every=4).generate(ids, max_new_tokens=8, do_sample=False)
    memory, streamer = LandmarkMemory(model, MARK, every=4), Put()
    found = memory.generate(
        ids, max_new_tokens=8, do_sample=False, stopping_criteria=StoppingCriteriaList([After()]), pad_token_id=3,
        streamer=streamer, return_dict_in_generate=True,
    ).sequences  # fmt: skip
    assert found.tolist() == [
        free[0, :9].tolist() + [3, 3],
        free[1, :10].tolist() + [3],
        free[2, :11].tolist(),
    ]
    assert memory.length.tolist() == [9 + 2, 10 + 2, 11 + 2]  # padding is not read
    assert streamer.pieces == [ids.tolist(), *found[:, 7:].T.tolist()] and streamer.ended
    model.generation_config.pad_token_id = None
    ended = LandmarkMemory(model, MARK, every=4).generate(
        ids, max_new_tokens=8, do_sample=False, eos_token_id=free[0, 8].item()
    )
    assert (ended[0, 8:] == free[0, 8]).all()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        options = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0}
        drawn.append(LandmarkMemory(model, MARK, every=4).generate(ids, **options))
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2])


def test_reading_during_training_and_attached_runs():
    model, ids = LLAMA.tiny(), words(20)
    expected = LandmarkMemory(model, MARK, every=4, chunk=8).read(ids)
    plain = model(ids).logits
    with landmark_training(model, MARK):
        assert LandmarkMemory(model, MARK, every=4, chunk=8).read(ids).equal(expected)
        model(insert_landmarks(ids, MARK, 4).input_ids)
    assert model(ids).logits.equal(plain)
    with A2SF(budget=4).on(model), pytest.raises(AlreadyAttached, match="already runs under A2SF"):
        LandmarkMemory(model, MARK, every=4).read(ids)


@pytest.mark.parametrize("name, value", [("every", 0), ("k", 0), ("blocks", -1), ("chunk", 1.5), ("k", True)])
def test_refuses_bad_numbers(name, value):
    with pytest.raises(ValueError, match=rf"LandmarkMemory.{name} must be a whole number >= 1, got {value}"):
        LandmarkMemory(LLAMA.tiny(), MARK, **{name: value})


def test_refuses_what_it_cannot_read():
    model = LLAMA.tiny()
    with pytest.raises(ValueError, match=r"LandmarkMemory.selection must be one of per_token_and_head, .* got 'mean'"):
        LandmarkMemory(model, MARK, selection="mean")
    with pytest.raises(ValueError, match=r"LandmarkMemory.blocks must be >= 5 for a chunk of 250, got 4"):
        LandmarkMemory(model, MARK, blocks=4)
    for family in ("gpt2", "llava"):
        with pytest.raises(UnsupportedModel):
            LandmarkMemory(FAMILIES[family].tiny(), MARK)
    memory = LandmarkMemory(model, MARK)
    with pytest.raises(PromptError, match="there is nothing to read"):
        memory.read(words(3), torch.zeros(1, 3))
    memory.read(words(3))
    with pytest.raises(PromptError, match="this memory holds 1 texts, the batch has 2"):
        memory.read(words(3, batch=2))
    with pytest.raises(PromptError, match="padding on the left"):
        memory.generate(words(3), torch.tensor([[1, 1, 0]]), max_new_tokens=1)
    with pytest.raises(PromptError, match="does not search beams"):
        memory.generate(words(3), num_beams=2, max_new_tokens=1)
