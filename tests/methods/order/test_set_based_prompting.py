import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqwise
from seqwise.core.errors import MissingExtra, PromptError, SlotConflict, UnsupportedModel
from seqwise.core.segments import Segments
from seqwise.methods import V2PE
from seqwise.methods.order.set_based_prompting import (
    SetBasedPrompting,
    answer_scores,
    next_position,
    positions,
    set_mask,
    visible,
)
from seqwise.testing.families import FAMILIES

SBP = SetBasedPrompting()
LLAMA = FAMILIES["llama"]
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}


def layout(*parts):
    """Set and member of a prompt's tokens, (1, L) each; parts are a count of text or a list of member lengths."""
    sets, numbers, found = [], [], 0
    for part in parts:
        if isinstance(part, int):
            sets, numbers = sets + [-1] * part, numbers + [-1] * part
        else:
            for i, length in enumerate(part):
                sets, numbers = sets + [found] * length, numbers + [i] * length
            found += 1
    return torch.tensor([sets]), torch.tensor([numbers])


def counted(*parts):
    """Positions of the same prompt with a running counter, and the next one."""
    p, c = [], 0
    for part in parts:
        if isinstance(part, int):
            p += range(c, c + part)
            c += part
        else:
            for length in part:
                p += range(c, c + length)
            c += max(part)
    return p, c


def segments(ids, sets, numbers, mask=None):
    return replace(Segments.infer(ids, mask, None), set=sets, member=numbers)


def arranged(pieces, order, seed=0):
    """A prompt of prefix, members in this order, suffix; member numbers are those of the unpermuted prompt."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(1, 97, (length,), generator=generator) for length in pieces]
    prefix, *own, suffix = texts
    ids = torch.cat([prefix, *(own[i] for i in order), suffix])[None]
    sets = torch.cat([torch.full_like(prefix, -1), *(torch.zeros_like(own[i]) for i in order), suffix * 0 - 1])[None]
    numbers = torch.cat([torch.full_like(prefix, -1), *(torch.full_like(own[i], i) for i in order), suffix * 0 - 1])
    return ids, segments(ids, sets, numbers[None])


# positions


def test_members_restart_and_the_suffix_goes_on_behind_the_longest():
    p = positions(*layout(3, [2, 4, 1], 2))
    assert p.dtype == torch.long and p.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 6, 3, 7, 8]]
    assert next_position(p).tolist() == [9]


PARTS = st.lists(
    st.one_of(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=6
)


@settings(max_examples=100, deadline=None)
@given(PARTS)
def test_prompts_of_several_sets_equal_a_running_counter(parts):
    wanted, following = counted(*parts)
    p = positions(*layout(*parts))
    assert p[0].tolist() == wanted
    if isinstance(parts[-1], int):
        assert next_position(p).tolist() == [following]


def test_one_member_is_the_ordinary_prompt():
    sets, numbers = layout(2, [5], 3)
    assert positions(sets, numbers)[0].tolist() == list(range(10))
    assert set_mask(sets, numbers)[0, 0].equal(torch.ones(10, 10).tril().bool())


def test_padding_and_batch_mates_change_nothing():
    prompts = [(3, [2, 4], 2), (1, [1, 1, 3], 1, [2, 2], 4), (7,), (1, [6], 1)]
    rows = [layout(*parts) for parts in prompts]
    L = max(sets.shape[1] for sets, _ in rows)
    for side in ("left", "right"):
        sets, numbers, mask = (torch.full((len(rows), L), fill) for fill in (0, 0, 0))  # padding looks like a member
        spans = []
        for b, (own_sets, own_numbers) in enumerate(rows):
            n = own_sets.shape[1]
            spans.append(slice(L - n, L) if side == "left" else slice(0, n))
            sets[b, spans[b]], numbers[b, spans[b]], mask[b, spans[b]] = own_sets[0], own_numbers[0], 1
        p, seen = positions(sets, numbers, mask), set_mask(sets, numbers, mask)
        for b, (own_sets, own_numbers) in enumerate(rows):
            alone = positions(own_sets, own_numbers)
            assert p[b, spans[b]].equal(alone[0]) and (p[b, mask[b] == 0] == 1).all()
            assert next_position(p, mask)[b] == next_position(alone)[0]
            assert seen[b, 0, spans[b], spans[b]].equal(set_mask(own_sets, own_numbers)[0, 0])
            pads = mask[b] == 0
            assert not seen[b, 0, ~pads][:, pads].any() and seen[b, 0].any(-1).all(), "no row may be empty"


# the mask


@pytest.mark.parametrize("parts", [(3, [2, 3], 2), (1, [1, 4, 2], 1, [3, 3], 2), (2, [2, 2], [1, 3], 1), (5,)])
def test_the_mask_equals_the_rule_pair_by_pair(parts):
    sets, numbers = layout(*parts)
    s, m = sets[0].tolist(), numbers[0].tolist()
    wanted = [
        [k <= q and not (s[q] >= 0 and s[q] == s[k] and m[q] != m[k]) for k in range(len(s))] for q in range(len(s))
    ]
    found = set_mask(sets, numbers)
    assert found.shape == (1, 1, len(s), len(s)) and found.dtype == torch.bool and found[0, 0].tolist() == wanted


def test_visibility_of_single_pairs_broadcasts():
    sets, numbers = torch.tensor([-1, 0, 0, 1]), torch.tensor([-1, 0, 1, 0])
    found = visible(sets[:, None], numbers[:, None], sets, numbers)
    assert found.int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 1, 1], [1, 1, 1, 1]]


def test_the_padded_variant_keeps_the_longest_members_places_and_hides_the_fill():
    sets, numbers = layout(2, [3, 3], 2)
    fill = torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1]])  # the first member has one real token
    assert positions(sets, numbers)[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    seen = set_mask(sets, numbers, fill)[0, 0]
    assert not seen[:, 3:5].any()
    assert seen[8, [0, 1, 2, 5, 6, 7, 8]].all() and seen[3, :3].all()


def test_a_boolean_mask_goes_to_sdpa_and_an_additive_one_to_eager():
    model = LLAMA.tiny()
    ids, facts = arranged([3, 2, 4, 3], (0, 1))
    mask, p = set_mask(facts.set, facts.member), positions(facts.set, facts.member)
    logits = {}
    with torch.no_grad():
        for kernel, given in (("sdpa", mask), ("eager", torch.where(mask, 0.0, torch.finfo(torch.float32).min))):
            model.set_attn_implementation(kernel)
            logits[kernel] = model(ids, attention_mask=given, position_ids=p, use_cache=False).logits
        with SBP.on(model) as run:
            run.bind(facts)
            logits["method"] = model(ids).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], **LLAMA.tolerance)
    torch.testing.assert_close(logits["method"], logits["sdpa"], **LLAMA.tolerance)


# invariance


@pytest.mark.parametrize("name", ["llama", "qwen3", "neox"])
def test_no_permutation_changes_what_follows_and_half_the_method_does_not_suffice(name):
    model = FAMILIES[name].tiny()
    pieces, worst = [4, 2, 5, 1, 6], {"both": 0.0, "mask": 0.0, "positions": 0.0}
    orders = list(itertools.permutations(range(3)))
    first = {}
    with torch.no_grad():
        for order in orders:
            ids, facts = arranged(pieces, order)
            mask, p = set_mask(facts.set, facts.member), positions(facts.set, facts.member)
            causal, plain = torch.ones_like(mask).tril(), torch.arange(ids.shape[1])[None]
            for arm, seen, at in (("both", mask, p), ("mask", mask, plain), ("positions", causal, p)):
                if arm == "both":
                    with SBP.on(model) as run:
                        run.bind(facts)
                        logits = model(ids).logits[:, -6:]
                else:
                    logits = model(ids, attention_mask=seen, position_ids=at, use_cache=False).logits[:, -6:]
                worst[arm] = max(worst[arm], float((logits - first.setdefault(arm, logits)).abs().max()))
    assert worst["both"] < 1e-4 and min(worst["mask"], worst["positions"]) > 1e-2, worst


@settings(max_examples=12, deadline=None)
@given(st.permutations(range(4)), st.lists(st.integers(1, 6), min_size=4, max_size=4), st.integers(0, 100))
def test_a_generation_does_not_depend_on_the_order(order, lengths, seed):
    model, pieces = LLAMA.tiny(), [2, *lengths, 3]
    seen = []
    for one in (range(4), order):
        ids, facts = arranged(pieces, one, seed)
        with SBP.on(model) as run:
            run.bind(facts)
            seen.append(model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS))
    for a, b in zip(seen[0].scores, seen[1].scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_cached_steps_equal_the_whole_sequence_again():
    model = LLAMA.tiny()
    ids, facts = arranged([3, 4, 2, 6, 4], (2, 0, 1))
    with SBP.on(model) as run:
        run.bind(facts)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
        assert run.acted
    n = out.sequences.shape[1]
    sets, numbers = (torch.nn.functional.pad(x, (0, n - ids.shape[1]), value=-1) for x in (facts.set, facts.member))
    with torch.no_grad():
        logits = model(
            out.sequences, attention_mask=set_mask(sets, numbers), position_ids=positions(sets, numbers),
            use_cache=False,
        ).logits  # fmt: skip
    for step, scores in enumerate(out.scores):
        torch.testing.assert_close(scores, logits[:, ids.shape[1] - 1 + step], **LLAMA.tolerance)


def test_prompts_of_several_sets_and_padding_equal_each_alone():
    model = LLAMA.tiny()
    rows = [(3, [2, 4], 2), (1, [1, 5, 3], 2, [2, 2], 4), (9,)]
    prompts = [LLAMA.prompt(sum(p if isinstance(p, int) else sum(p) for p in parts), seed=b)
               for b, parts in enumerate(rows)]  # fmt: skip
    facts = [segments(p["input_ids"], *layout(*parts)) for p, parts in zip(prompts, rows, strict=True)]
    batch = LLAMA.pad_left(prompts)
    with SBP.on(model) as run:
        run.bind(Segments.padded(facts, batch["input_ids"].shape[1]))
        together = model.generate(**batch, **OPTIONS)
    for b, (prompt, fact) in enumerate(zip(prompts, facts, strict=True)):
        if not fact.has("set"):
            alone = model.generate(**prompt, **OPTIONS)  # a prompt without a set is plain
        else:
            with SBP.on(model) as run:
                run.bind(fact)
                alone = model.generate(**prompt, **OPTIONS)
        for ours, theirs in zip(together.scores, alone.scores, strict=True):
            torch.testing.assert_close(ours[b], theirs[0], **LLAMA.tolerance)


def test_one_member_changes_nothing():
    model = LLAMA.tiny()
    ids, facts = arranged([3, 6, 4], (0,))
    with torch.no_grad():
        plain = model(ids).logits
        with SBP.on(model) as run:
            run.bind(facts)
            torch.testing.assert_close(model(ids).logits, plain, **LLAMA.tolerance)


def test_equal_members_are_fine():
    model = LLAMA.tiny()
    ids = torch.tensor([[5, 6, 9, 9, 9, 9, 9, 9, 8]])
    facts = segments(ids, *layout(2, [2, 2, 2], 1))
    with torch.no_grad(), SBP.on(model) as run:
        run.bind(facts)
        logits = model(ids).logits[0]
    torch.testing.assert_close(logits[2:4], logits[4:6], **LLAMA.tolerance)
    torch.testing.assert_close(logits[2:4], logits[6:8], **LLAMA.tolerance)


# refusals


@pytest.mark.parametrize(
    "sets, numbers, message",
    [
        ([-1, 0, 0, 0, -1], [-1, 0, 1, 0, -1], "members must not overlap"),
        ([-1, 0, 0, -1, -1], [-1, 0, 2, -1, -1], "member 1 of set 0 has no tokens"),
        ([-1, 0, -1, 0, -1], [-1, 0, -1, 1, -1], "separators belong to the members"),
    ],
)
def test_sets_that_are_none_are_refused_before_anything_runs(sets, numbers, message):
    model = LLAMA.tiny()
    ids, calls = torch.tensor([[1, 2, 3, 4, 5]]), []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with SBP.on(model) as run, pytest.raises(PromptError, match=message):
        run.bind(segments(ids, torch.tensor([sets]), torch.tensor([numbers])))
        model.generate(ids, max_new_tokens=2)
    handle.remove()
    assert calls == []


def test_models_without_rotary_positions_or_with_windows_are_refused():
    for name, message in (("gpt2", "rotary positions"), ("mistral", "sliding windows"), ("qwen25_vl", "3-axis RoPE")):
        with pytest.raises(UnsupportedModel, match=rf"SetBasedPrompting\(\) needs .*{message}"):
            SBP.on(FAMILIES[name].tiny())
    with pytest.raises(SlotConflict, match="positions"):
        SBP | V2PE()
    with SBP.on(LLAMA.tiny()) as run, pytest.raises(PromptError, match=r"needs a set of pieces"):
        run.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2)


# answers


def test_an_answer_is_scored_by_the_mean_of_its_tokens_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 7, generator=generator)
    answers = torch.tensor([[3, -1, -1], [1, 6, 2], [0, 5, -1]])
    found = answer_scores(logits, answers)
    for b in range(2):
        means = [
            float(logits[b, 0, 3]),
            float(logits[b, 0, 1] + logits[b, 1, 6] + logits[b, 2, 2]) / 3,
            float(logits[b, 0, 0] + logits[b, 1, 5]) / 2,
        ]
        torch.testing.assert_close(found[b], torch.tensor(means).softmax(-1))
    assert answer_scores(logits[0], answers).equal(found[0])
    wide = torch.cat([answers, torch.full((3, 4), -1)], 1)
    assert answer_scores(logits, wide).equal(found), "padding behind the answers does not count"


@pytest.mark.parametrize("answers", [[[1, 2, 3]], [[1, 2, -1], [-1, -1, -1]]])
def test_answers_without_tokens_or_longer_than_the_run_are_refused(answers):
    lengths = [sum(token >= 0 for token in answer) for answer in answers]
    with pytest.raises(ValueError, match=rf"answers must have 1 to 2 tokens each .*got {re.escape(str(lengths))}"):
        answer_scores(torch.zeros(2, 5), torch.tensor(answers))


@pytest.mark.slow
def test_a_real_models_answer_does_not_depend_on_the_order():
    from seqwise.lab.zoo import load_model

    try:
        model, tokenizer = load_model()
    except MissingExtra as error:
        pytest.skip(str(error))
    items = ["The apple costs 31 coins. ", "The lamp costs 77 coins. ", "A violin costs 12 coins, says Ann. "]
    seen, plain = [], []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        content = [
            {"type": "text", "text": "Read these prices: "},
            {"type": "set", "items": [items[i] for i in order]},
            {"type": "text", "text": "How much does the violin cost?"},
        ]
        batch, facts = seqwise.prepare(tokenizer, [{"role": "user", "content": content}])
        with torch.no_grad():
            plain.append(model(**batch).logits[0, -1])
        with SBP.on(model) as run:
            run.bind(facts)
            out = model.generate(**batch, **{**OPTIONS, "max_new_tokens": 12})
        seen.append((tokenizer.decode(out.sequences[0, batch["input_ids"].shape[1] :]), out.scores[0]))
    assert max(float((p - plain[0]).abs().max()) for p in plain) > 0.1
    assert max(float((scores - seen[0][1]).abs().max()) for _, scores in seen) < 1e-3
    assert len({text for text, _ in seen}) == 1 and "violin" in seen[0][0], seen
