import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d, cosine_similarity

from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import PromptError, SlotConflict, UnsupportedModel, UsageError
from seqwise.methods.reduce import quota
from seqwise.methods.reduce.flowcut import FlowCut
from seqwise.methods.reduce.fopru import FoPru
from seqwise.methods.reduce.quota import (
    QuoTA,
    adaptive_pool,
    allocate,
    bilinear,
    bipartite_merge,
    capped,
    decouple_prompt,
    frame_scorer,
    grid_of,
    lay_out,
    merge,
    merge_axes,
    parse_entities,
    resize,
    scoring_prompt,
    select,
    weights,
    yes_probability,
)
from seqwise.testing.families import FAMILIES

IMAGE = 97  # the placeholder token of the families
scores = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=9)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# how many tokens


def test_weights_are_powers_that_sum_to_one():
    w = weights(torch.tensor([0.9, 0.3, 0.0]))
    torch.testing.assert_close(w, torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64), atol=1e-7, rtol=0)
    torch.testing.assert_close(weights(100 * torch.tensor([0.9, 0.3, 0.0])), w)  # a factor cancels
    torch.testing.assert_close(weights(torch.tensor([0.9, 0.3]), gamma=1.0)[0].item(), 0.75, atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_vanishing_scores_are_finite(dtype):
    assert weights(torch.zeros(4, dtype=dtype)).tolist() == [0.25] * 4
    tiny = torch.tensor([1.2e-7, 6e-8], dtype=dtype)  # their squares are 0 in half precision
    assert weights(tiny).sum() == 1 and weights(tiny)[0] > weights(tiny)[1] > 0
    assert weights(torch.tensor([[0.0, 0.0], [1.0, 0.0]])).tolist() == [[0.5, 0.5], [1.0, 0.0]]  # row by row


def plain_capped(w: list[float], m: float) -> list[float]:
    out = [min(x, m) for x in w]
    excess, rem = sum(w) - sum(out), sum(out)
    for i in range(len(out)):
        if out[i] < m:
            out[i] += out[i] / rem * excess
            if out[i] > m:
                excess += out[i] - m
                out[i] = m
    return out


def test_capped_read_by_eye():
    w = capped(torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), 0.4)
    # cut 0.3, rest 0.7: 0.2 + 0.2 / 0.7 * 0.3, 0.1 + 0.1 / 0.7 * 0.3
    torch.testing.assert_close(w.tolist(), [0.4, 0.2 + 0.06 / 0.7, 0.1 + 0.03 / 0.7])
    assert w.sum() < 1  # one pass
    later = capped(torch.tensor([0.7, 0.28, 0.02], dtype=torch.float64), 0.3)
    assert later[1] == 0.3 and later[2] > 0.02 + 0.02 / 0.6 * 0.4  # the second frame's surplus goes to those behind it


@settings(max_examples=60, deadline=None)
@given(p=scores, m=st.floats(0.05, 1.0))
def test_capped_equals_the_plain_loop(p, m):
    w = weights(torch.tensor(p))
    found = capped(w, m)
    torch.testing.assert_close(found.tolist(), plain_capped(w.tolist(), m))
    assert (found <= m).all() and found.sum() <= 1 + 1e-9 and (found >= w.clamp(max=m) - 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(p=scores, Q=st.integers(1, 800))
def test_allocation_spends_the_budget_but_for_less_than_a_token_a_frame(p, Q):
    n = allocate(weights(torch.tensor(p)), Q)
    assert Q - len(p) < n.sum() <= Q and (n >= 0).all()
    held = allocate(weights(torch.tensor(p)), Q, 36)
    assert (held <= 36).all() and held.sum() <= Q


@pytest.mark.parametrize("frames", [3, 7, 49, 64])
def test_equal_scores_give_equal_grids_whatever_the_rounding(frames):
    assert allocate(weights(torch.full((frames,), 0.3)), 9 * frames).tolist() == [9] * frames


def test_allocation_truncates_and_drops():
    w = torch.tensor([0.005, 0.495, 0.5], dtype=torch.float64)
    assert allocate(w, 100).tolist() == [0, 49, 50]
    assert allocate(w, 100, torch.tensor([9, 9, 80])).tolist()[1:] == [9, 80]
    with pytest.raises(ValueError, match=r"allocate: Q must be >= 1, got 0"):
        allocate(w, 0)


def test_grids_read_by_eye():
    assert [grid_of(n) for n in range(8)] == [(0, 0), (1, 1), (2, 1), (2, 1), (2, 2), (2, 2), (3, 2), (3, 2)]
    assert grid_of(729) == (27, 27) and grid_of(12544) == (112, 112)


@given(n=st.integers(1, 100_000))
def test_grids_lose_at_most_a_row(n):
    h, w = grid_of(n)
    assert h in (w, w + 1) and 0 <= n - h * w <= w


# resizing


def plain_bilinear(x: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Half-pixel centres, clamped at the edge, two taps an axis."""

    def taps(i: int, before: int, after: int) -> list[tuple[int, float]]:
        at = max((i + 0.5) * before / after - 0.5, 0.0)
        low = min(int(at), before - 1)
        return [(low, 1 - (at - low)), (min(low + 1, before - 1), at - low)]

    rows = []
    for i in range(size[0]):
        for j in range(size[1]):
            rows.append(
                sum(
                    a * b * x[r * grid[1] + c]
                    for r, a in taps(i, grid[0], size[0])
                    for c, b in taps(j, grid[1], size[1])
                )
            )
    return torch.stack(rows)


@pytest.mark.parametrize(
    "grid, size", [((5, 7), (3, 2)), ((4, 4), (4, 4)), ((3, 3), (5, 4)), ((6, 6), (1, 1)), ((27, 27), (14, 13))]
)
def test_bilinear_shrinks_and_enlarges(grid, size):
    x = draw(grid[0] * grid[1], 3)
    torch.testing.assert_close(bilinear(x, grid, size), plain_bilinear(x, grid, size), atol=1e-5, rtol=1e-5)
    both = bilinear(torch.stack([x, 2 * x]), grid, size)
    torch.testing.assert_close(both, torch.stack([bilinear(x, grid, size), 2 * bilinear(x, grid, size)]))


def test_pooling_of_a_divisor_is_plain_pooling():
    x = draw(36, 5)
    plain = avg_pool2d(x.mT.view(1, 5, 6, 6), 2).flatten(2)[0].mT  # 3 x 3
    n = int(allocate(weights(torch.full((4,), 0.7)), 36)[0])
    torch.testing.assert_close(resize(x, (6, 6), n, "pool"), plain)
    torch.testing.assert_close(adaptive_pool(x, (6, 6), (1, 1))[0], x.mean(0))


def test_select_takes_evenly_spaced_tokens():
    x = torch.arange(10.0)[:, None]
    assert select(x, 4).flatten().tolist() == [0, 3, 6, 9]
    assert select(x, 3).flatten().tolist() == [0, 4, 9]
    assert select(x, 1).flatten().tolist() == [0]
    assert select(x, 10).equal(x) and select(torch.stack([x, x]), 4).shape == (2, 4, 1)


def plain_merge(x: torch.Tensor, target: int) -> torch.Tensor:
    tokens = list(x)
    while len(tokens) > target:
        A, B = tokens[::2], tokens[1::2]
        r = min(len(tokens) - target, len(tokens) // 2)
        best = [max((float(cosine_similarity(a, b, dim=0)), -j) for j, b in enumerate(B)) for a in A]
        order = sorted(range(len(A)), key=lambda i: -best[i][0])
        groups = [[b] for b in B]
        for i in order[:r]:
            groups[-best[i][1]].append(A[i])
        tokens = [A[i] for i in order[r:]] + [torch.stack(group).mean(0) for group in groups]
    return torch.stack(tokens)


@pytest.mark.parametrize("n, target", [(9, 8), (9, 5), (9, 4), (9, 1), (16, 3), (2, 1), (7, 7)])
def test_merging_equals_the_plain_rounds(n, target):
    x = draw(n, 6, seed=n + target)
    torch.testing.assert_close(bipartite_merge(x, target), plain_merge(x, target))
    both = torch.stack([x, draw(n, 6, seed=99)])
    torch.testing.assert_close(bipartite_merge(both, target)[1], plain_merge(both[1], target))


def test_merging_orders_what_stays_by_falling_similarity():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.5, 0.8], [0.3, 1.0], [9.0, 0.0]])
    # even: 0 meets 5 (cosine 1), 2 meets 3 (.85), 4 meets 3 (.97); one joins: 0 into 5
    assert bipartite_merge(x, 5).tolist() == [x[4].tolist(), x[2].tolist(), x[1].tolist(), x[3].tolist(), [5.0, 0.0]]


def test_merge_pools_first_and_merges_then():
    x = draw(729, 4)
    pooled = adaptive_pool(x, (27, 27), (14, 14))
    torch.testing.assert_close(merge(x, (27, 27), 100), bipartite_merge(pooled, 100))
    assert merge(x, (27, 27), 500).shape == (196, 4)  # no more than are left of the pooling
    torch.testing.assert_close(merge(x[:16], (4, 4), 6), bipartite_merge(x[:16], 6))  # small grids are not enlarged


def test_merging_along_rows_and_then_columns():
    x = draw(5 * 6, 4)
    rows = torch.stack([plain_merge(x.view(5, 6, 4)[i], 3) for i in range(5)])  # (5, 3, 4)
    wanted = torch.stack([plain_merge(rows[:, j], 4) for j in range(3)], 1)  # (4, 3, 4)
    torch.testing.assert_close(merge_axes(x, (5, 6), (4, 3)), wanted.flatten(0, 1))


@pytest.mark.parametrize("how", ["bilinear", "pool", "select", "merge", "merge2d"])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
def test_every_resizer_takes_edge_counts(how, n):
    x = draw(16, 4).bfloat16()
    found = resize(x, (4, 4), n, how)
    h, w = grid_of(n)
    assert found.shape == (n if how in ("select", "merge") else h * w, 4) and found.dtype == torch.bfloat16
    if n == 16:
        assert found.equal(x)  # nothing to do


def test_layouts_of_newlines():
    frames = [torch.arange(4.0).view(2, 2, 1), torch.arange(10.0, 13).view(3, 1, 1)]
    newline = torch.tensor([-1.0])
    assert lay_out(frames, newline).flatten().tolist() == [0, 1, -1, 2, 3, -1, 10, -1, 11, -1, 12, -1]  # h a frame
    assert lay_out(frames, newline, "one_token").flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, -1]
    assert lay_out(frames).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12]


# what the question is about


@pytest.mark.parametrize(
    "reply, entities",
    [
        ('Step 1: Yes\nStep 2: a cup, red\nSTEP 3: ["cup", "red box "]', ["cup", "red box"]),
        ("step 1:yes. step 2: cup step 3: the list is ['cup']", ["cup"]),
        ('Step 1: no\nStep 3: ["cup"]', []),  # the list does not count
        ("Step 1: yes\nStep 3: cup", []),
        ("Step 1: yes\nStep 3: [cup, dog]", []),  # no texts
        ("Step 1: yes\nStep 3: [__import__('os').getcwd()]", []),  # is read, not run
        ("Step 1: yes\nStep 3: ['cup', 3, '']", ["cup"]),
        ("Step 1: yes\nStep 3: ['cup'", []),
        ("", []),
    ],
)
def test_replies_are_parsed_literally(reply, entities):
    assert parse_entities(reply) == entities


def test_the_prompt_shows_three_worked_examples_that_parse():
    text = decouple_prompt("Who won?")
    examples = text.split("Question: ")[1:]
    assert len(examples) == 4 and examples[-1] == "Who won?\n"
    assert [len(parse_entities(one)) for one in examples] == [2, 0, 5, 0]


def test_the_scorer_is_asked_for_objects_or_else_for_the_question():
    assert scoring_prompt("Who won?", ["cup", "dog"]).startswith(
        "Does the image contain any object of cup, dog?\nA. yes"
    )
    assert scoring_prompt("Who won?").startswith("Who won?\nDoes the image contain sufficient information")


def test_the_probability_of_yes():
    logits = torch.tensor([[2.0, 1.0, 0.0, 5.0]])
    assert yes_probability(logits, 0).item() == pytest.approx(math.exp(2) / sum(map(math.exp, (2, 1, 0, 5))))
    assert yes_probability(logits, 0, 1).item() == pytest.approx(1 / (1 + math.exp(-1)))


# the class, on tiny random models


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"].tiny()


def strip_text(batch, between=False):
    """A prompt of 6 words and then three images of 16 tokens in a row, or with a word between them, and 5 words."""
    ids = batch["input_ids"][0]
    words = ids[ids != IMAGE].tolist()
    image = [IMAGE] * 16
    gap = [words[-1]] if between else []
    row = [*words[:6], *image, *gap, *image, *gap, *image, *words[6:11]]
    return {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long),
            "pixel_values": batch["pixel_values"]}  # fmt: skip


@pytest.fixture
def video():
    return strip_text(FAMILIES["llava"].prompt(20, images=3))


def logits(model, batch, method=None, p=None):
    """Logits of one forward, and the run."""
    with torch.no_grad():
        if method is None:
            return model(**batch).logits, None
        scorer = None if p is None else lambda: torch.tensor(p)
        with method.on(model, scorer=scorer) as run:
            return model(**batch).logits, run


def by_hand(model, batch, sized):
    """Last logits where the frames' features are replaced by these, features -> (k, D) each."""
    with torch.no_grad():
        found = model.get_image_features(batch["pixel_values"]).pooler_output
        embed = model.get_input_embeddings()(batch["input_ids"])[0]
        ids = batch["input_ids"][0]
        pieces, at = [], 0
        for x, make in zip(found, sized, strict=True):
            first = int((ids[at:] == IMAGE).nonzero()[0]) + at
            pieces += [embed[at:first], make(x)]
            at = first + len(x)
        whole = torch.cat([*pieces, embed[at:]])[None]
        return model.model.language_model(inputs_embeds=whole).last_hidden_state[0, -1] @ model.lm_head.weight.T


def test_frames_are_resized_in_order_by_relevance(llava, video):
    p = [0.2, 0.9, 0.1]
    n = allocate(weights(torch.tensor(p)), 24)  # 1, 22, 0: the second is enlarged over the first's place
    assert n.tolist() == [1, 22, 0]
    found, run = logits(llava, video, QuoTA(budget=24), p)
    wanted = by_hand(llava, video, [
        lambda x: bilinear(x, (4, 4), (1, 1)), lambda x: bilinear(x, (4, 4), (5, 4)), lambda x: x[:0],
    ])  # fmt: skip
    torch.testing.assert_close(found[0, -1], wanted, **FAMILIES["llava"].tolerance)
    kept = [position for position in run.kept()[0]["input"] if 6 <= position < 54]
    assert len(kept) == 21 and run.acted
    assert kept == sorted(kept) and kept[0] == 6 and kept[1:] == list(range(22, 42))  # each from its own place on


@pytest.mark.parametrize("how", ["pool", "select", "merge", "merge2d"])
def test_resizers_without_interpolation_never_exceed_a_frame(llava, video, how):
    p = [0.02, 1.0, 0.03]
    n = allocate(weights(torch.tensor(p)), 24, 16).tolist()
    assert n[1] == 16
    found, _ = logits(llava, video, QuoTA(budget=0.5, resize=how), p)
    wanted = by_hand(llava, video, [lambda x, k=k: resize(x, (4, 4), k, how) if k else x[:0] for k in n])
    torch.testing.assert_close(found[0, -1], wanted, **FAMILIES["llava"].tolerance)


def test_text_between_frames_leaves_them_their_own_places():
    model, batch = FAMILIES["llava"].tiny(), strip_text(FAMILIES["llava"].prompt(20, images=3), between=True)
    with pytest.raises(PromptError, match=r"need 42 tokens where the prompt has 16 .* set cap=True"):
        logits(model, batch, QuoTA(budget=1.0), [0.1, 0.9, 0.1])
    found, run = logits(model, batch, QuoTA(budget=1.0, cap=True), [0.1, 0.9, 0.1])
    n = allocate(weights(torch.tensor([0.1, 0.9, 0.1])), 48, 16).tolist()
    wanted = by_hand(model, batch, [lambda x, k=k: bilinear(x, (4, 4), grid_of(k)) for k in n])
    torch.testing.assert_close(found[0, -1], wanted, **FAMILIES["llava"].tolerance)
    ids = batch["input_ids"][0]
    assert [i for i in range(len(ids)) if ids[i] != IMAGE and i not in run.kept()[0]["input"]] == []


def test_enlarged_frames_spill_over_to_both_sides(llava, video):
    found, run = logits(llava, video, QuoTA(budget=1.0), [0.0, 0.0, 1.0])  # 48 tokens: 7 x 6 of the last frame
    wanted = by_hand(llava, video, [lambda x: x[:0], lambda x: x[:0], lambda x: bilinear(x, (4, 4), (7, 6))])
    torch.testing.assert_close(found[0, -1], wanted, **FAMILIES["llava"].tolerance)
    assert run.kept()[0]["input"] == [*range(6), *range(12, 54), *range(54, 59)]


def test_a_lone_frame_gets_everything_and_needs_no_scorer(llava):
    batch = FAMILIES["llava"].prompt(17)
    plain, _ = logits(llava, batch)
    same, run = logits(llava, batch, QuoTA(budget=1.0))
    assert same.equal(plain) and not run.acted
    small, run = logits(llava, batch, QuoTA(budget=9))
    wanted = by_hand(llava, batch, [lambda x: bilinear(x, (4, 4), (3, 3))])
    torch.testing.assert_close(small[0, -1], wanted, **FAMILIES["llava"].tolerance)


def test_several_frames_need_a_scorer_that_fits(llava, video):
    with pytest.raises(PromptError, match=r"relevance of 3 frames; attach it by on\(model, scorer=\.\.\.\)"):
        logits(llava, video, QuoTA())
    with pytest.raises(PromptError, match="one number per frame, 3, got 2"):
        logits(llava, video, QuoTA(), [0.5, 0.5])
    for bad in ([0.5, float("nan"), 0.5], [0.5, -0.1, 0.5]):
        with pytest.raises(PromptError, match="finite numbers >= 0"):
            logits(llava, video, QuoTA(), bad)


def test_each_sample_has_a_budget_of_its_own(llava):
    family = FAMILIES["llava"]
    prompts = [family.prompt(9, images=0), family.prompt(12, seed=1, images=2), family.prompt(20, seed=2, images=3)]
    p = [[], [0.4, 0.5], [0.5, 0.2, 0.9]]
    method = QuoTA(budget=0.4, cap=True)
    together, run = logits(llava, family.pad_left(prompts), method, [x for each in p for x in each])
    for b, (prompt, own) in enumerate(zip(prompts, p, strict=True)):
        alone, one = logits(llava, prompt, method, own or None)
        torch.testing.assert_close(together[b, -1], alone[0, -1], **family.tolerance)
        # a batch with images counts text-only samples too
        assert not own or run.kept()[b]["input"] == one.kept()[0]["input"]


def test_generation_with_several_returned_sequences_asks_once(llava, video):
    asked = []

    def scorer():
        asked.append(1)
        return torch.tensor([0.2, 0.9, 0.4])

    options = {"do_sample": False, "max_new_tokens": 3, "num_beams": 2, "num_return_sequences": 2}
    with QuoTA(budget=0.5).on(llava, scorer=scorer) as run:
        ids = llava.generate(**video, **options)
    assert asked == [1] and len(ids) == 2
    assert run.kept()[0]["input"] == run.kept()[1]["input"]


def test_positions_are_compact(llava, video):
    seen = {}
    hook = llava.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(at=kwargs["position_ids"]), with_kwargs=True
    )
    try:
        logits(llava, video, QuoTA(budget=20), [0.3, 0.9, 0.3])
    finally:
        hook.remove()
    assert seen["at"][0].tolist() == list(range(len(seen["at"][0])))


@pytest.mark.parametrize("how", ["bilinear", "select"])
def test_frames_thinned_in_the_tower_are_merged_or_selected(llava, video, how):
    p = [0.3, 0.9, 0.6]
    _, pruned = logits(llava, video, FlowCut(budget=9))
    _, run = logits(llava, video, FlowCut(budget=9) | QuoTA(budget=0.5, resize=how), p)
    counts = allocate(weights(torch.tensor(p)), 27 // 2, 9 if how == "select" else None)
    assert counts.tolist() == [0, 8, 3] if how == "select" else [0, 9, 3]

    def visual(one):
        return [position for position in one.kept()[0]["input"] if 6 <= position < 54]

    assert len(visual(pruned)) == 27 and len(visual(run)) == int(counts.sum())
    x = draw(9, 4)
    assert resize(x, None, 5, "pool").equal(bipartite_merge(x, 5)) and resize(x, None, 5, "select").equal(select(x, 5))


def test_composition_and_refusals():
    with pytest.raises(SlotConflict):
        QuoTA() | FoPru()
    for family, part in (("qwen25_vl", "3-axis RoPE"), ("llama", "vision tower")):
        with pytest.raises(UnsupportedModel, match=part):
            QuoTA().on(FAMILIES[family].tiny())
    with pytest.raises(UnsupportedModel, match="packs each image from several tiles; UniformGrid"):
        QuoTA().on(FAMILIES["llava_next"].tiny())
    assert Anatomy.of(FAMILIES["llava"].tiny()).vision.grid == (4, 4)


@pytest.mark.parametrize("field, value", [("budget", 0), ("budget", 1.5), ("gamma", 0.0), ("resize", "nearest")])
def test_bad_hyperparameters_are_named(field, value):
    with pytest.raises(ValueError, match=rf"QuoTA\.{field} must be"):
        QuoTA(**{field: value})


def test_text_round_trip():
    method = QuoTA(budget=64, gamma=1.0, resize="merge2d", cap=True)
    assert QuoTA.parse(str(method)) == method


# the scorer


class Processor:
    """Frames are numbers; prompts come in the lengths that they name."""

    def __init__(self) -> None:
        self.tokenizer, self.asked = self, []
        self.padding_side, self.image_token_id = "right", IMAGE

    def encode(self, word, add_special_tokens):
        return {"A": [7], "B": [8]}.get(word, [1, 2])

    def apply_chat_template(self, talks, **options):
        self.asked.append([[part.get("text", part.get("image")) for part in talk[0]["content"]] for talk in talks])
        assert self.padding_side == "left" and options["processor_kwargs"] == {"padding": True}
        parts = [FAMILIES["llava"].prompt(5 + frame, seed=frame) for frame in (q[0] for q in self.asked[-1])]
        return FAMILIES["llava"].pad_left(parts)


def test_frames_are_scored_alone_by_the_probability_of_yes(llava):
    processor = Processor()
    p = frame_scorer(llava, processor, [3, 0, 7], "Who?", ["cup"], batch=2)()
    wanted = []
    for frame in (3, 0, 7):
        alone, _ = logits(llava, FAMILIES["llava"].prompt(5 + frame, seed=frame))
        wanted.append(alone[0, -1].softmax(-1)[7])
    torch.testing.assert_close(p, torch.stack(wanted), atol=1e-5, rtol=1e-4)
    assert processor.asked == [[[3, scoring_prompt("Who?", ["cup"])], [0, scoring_prompt("Who?", ["cup"])]],
                               [[7, scoring_prompt("Who?", ["cup"])]]]  # fmt: skip
    assert processor.padding_side == "right"  # as it was
    pair = frame_scorer(llava, processor, [3], "Who?", prompt="is it ?", no="B")()
    a, b = logits(llava, FAMILIES["llava"].prompt(8, seed=3))[0][0, -1, 7:9]
    torch.testing.assert_close(pair[0], (a - b).sigmoid())
    assert processor.asked[-1] == [[3, "is it ?"]]


def test_an_attached_model_scores_as_the_plain_one(llava):
    plain = frame_scorer(llava, Processor(), [3, 1], "Who?")()
    with QuoTA(budget=1, cap=True).on(llava):
        assert frame_scorer(llava, Processor(), [3, 1], "Who?")().equal(plain)


def test_a_scorer_needs_frames_and_answers_of_one_token(llava):
    with pytest.raises(UsageError, match="at least one image"):
        frame_scorer(llava, Processor(), [], "Who?")
    with pytest.raises(UsageError, match="'perhaps' is 2"):
        frame_scorer(llava, Processor(), [1], "Who?", yes="perhaps")


def test_frames_are_the_tiles_of_a_video():
    """Two samples: an image of two tiles of 2 x 2, and two images of which the second has lost a token."""
    image = torch.tensor([[-1, 0, 0, 0, 0, 0, 0, 0, 0, -1], [0, 0, 0, 0, 1, 1, 1, -1, -1, -1]])
    tile = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, 1, -1], [0, 0, 0, 0, 0, 0, 0, -1, -1, -1]])
    row = torch.tensor([[-1, 0, 0, 1, 1, 0, 0, 1, 1, -1], [0, 0, 1, 1, 0, 0, 1, -1, -1, -1]])
    column = torch.tensor([[-1, 0, 1, 0, 1, 0, 1, 0, 1, -1], [0, 1, 0, 1, 0, 1, 0, -1, -1, -1]])
    facts = {"tile": tile, "row": row, "column": column}
    stage = SimpleNamespace(image=image, visual=image >= 0, fact=facts.__getitem__)
    found = [(f.sample, f.rows.tolist(), f.grid) for f in quota.frames_of(stage)]
    assert found == [
        (0, [1, 2, 3, 4], (2, 2)), (0, [5, 6, 7, 8], (2, 2)), (1, [0, 1, 2, 3], (2, 2)), (1, [4, 5, 6], None),
    ]  # fmt: skip
