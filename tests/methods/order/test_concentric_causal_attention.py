import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.core.errors import PromptError, UnsupportedModel
from seqwise.core.segments import IMAGE, TEXT, Segments, image_runs
from seqwise.methods.order.concentric_causal_attention import (
    ConcentricCausalAttention,
    concentric_mask,
    locate,
    next_position,
    positions,
    ring_of,
    rings,
    training_inputs,
    visible,
)
from seqwise.methods.reduce.fopru import FoPru
from seqwise.testing.families import FAMILIES


def peeled(Hg, Wg):
    """Rings by taking the border off again and again."""
    ring, left, c = {}, {(y, x) for y in range(Hg) for x in range(Wg)}, 0
    while left:
        rows, columns = {y for y, _ in left}, {x for _, x in left}
        border = {
            (y, x) for y, x in left if y in (min(rows), max(rows)) or x in (min(columns), max(columns))
        }  # fmt: skip
        ring |= dict.fromkeys(border, c)
        left, c = left - border, c + 1
    return [[ring[y, x] for x in range(Wg)] for y in range(Hg)]


def sequence(*parts):
    """A prompt of text counts and grids: rings (1, L) with -1 at text, and the image of each token."""
    ring, image, images = [], [], 0
    for part in parts:
        flat = [-1] * part if isinstance(part, int) else [c for row in peeled(*part) for c in row]
        ring += flat
        image += [-1 if isinstance(part, int) else images] * len(flat)
        images += not isinstance(part, int)
    return torch.tensor([ring]), torch.tensor([image])


def counted(*parts):
    """Positions of the same prompt, part by part."""
    p, now = [], 0
    for part in parts:
        if isinstance(part, int):
            p += range(now, now + part)
            now += part
        else:
            p += [now + c for row in peeled(*part) for c in row]
            now += (min(part) + 1) // 2
    return p, now


def seen_by_hand(ring, image):
    n = len(ring)
    return [
        [
            ring[j] <= ring[i] if image[i] >= 0 and image[i] == image[j] else j <= i
            for j in range(n)
        ]
        for i in range(n)
    ]  # fmt: skip


# rings


@pytest.mark.parametrize("grid", [(24, 24), (8, 8), (1, 1), (3, 3), (5, 7), (7, 4), (1, 6), (6, 2)])
def test_rings_are_what_is_left_when_borders_are_peeled_off(grid):
    found = rings(*grid)
    assert found.dtype == torch.long and found.tolist() == peeled(*grid)
    assert int(found.max()) + 1 == (min(grid) + 1) // 2


def test_a_24_x_24_grid_has_12_rings_and_four_cells_in_the_centre():
    found = rings(24, 24)
    assert (found == 11).nonzero().tolist() == [[11, 11], [11, 12], [12, 11], [12, 12]]
    assert int((found == 0).sum()) == 4 * 23
    assert int((rings(5, 5) == 2).sum()) == 1  # odd sides end in one cell


def test_rings_of_cells_broadcast_over_grids():
    row, column = torch.tensor([0, 2, 1]), torch.tensor([3, 2, 1])
    Hg, Wg = torch.tensor([4, 5, 9]), torch.tensor([7, 5, 9])
    assert ring_of(row, column, Hg, Wg).tolist() == [0, 2, 1]


@pytest.mark.parametrize("grid", [(0, 3), (3, 0), (-1, 2)])
def test_empty_grids_are_refused(grid):
    with pytest.raises(ValueError, match=rf"at least one row and one column, got {grid[0]} x {grid[1]}"):
        rings(*grid)


# positions


@pytest.mark.parametrize("a", [0, 5, 35])
def test_positions_around_a_576_token_image(a):
    ring, image = sequence(a, (24, 24), 9)
    p = positions(ring, image)[0]
    assert p.dtype == torch.long
    assert p[:a].tolist() == list(range(a))
    assert p[a : a + 576].view(24, 24).equal(a + rings(24, 24))
    assert p[a + 576 :].tolist() == list(range(a + 12, a + 21))
    L = a + 576 + 9
    assert next_position(p[None]).tolist() == [L - 576 + 12]
    assert int(p[a + 576] - p[a : a + 576].min()) == 12, "raster order: 576"


PARTS = st.lists(st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 5), st.integers(1, 5))), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(PARTS)
def test_prompts_of_many_images_equal_counting_part_by_part(parts):
    ring, image = sequence(*parts)
    wanted, following = counted(*parts)
    p = positions(ring, image)
    assert p[0].tolist() == wanted
    assert next_position(p).tolist() == [following]


def test_images_apart_need_no_ids_and_adjacent_ones_do():
    ring, image = sequence(2, (2, 3), 1, (3, 3), 1)
    assert positions(ring).equal(positions(ring, image))
    assert image_runs(ring >= 0).equal(image)
    ring, image = sequence(2, (2, 2), (2, 2), 1)
    assert positions(ring, image)[0].tolist() == [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4]
    assert positions(ring)[0].tolist() == [0, 1] + [2] * 8 + [3]  # one run is one image
    assert image_runs(ring >= 0, image * 7).equal(image)


def test_padding_and_batch_mates_change_nothing():
    prompts = [(3, (4, 4), 2), (1, (2, 3), 1, (3, 3), 4), (7,), ((3, 5), 1)]
    rows = [sequence(*parts) for parts in prompts]
    L = max(ring.shape[1] for ring, _ in rows)
    for side in ("left", "right"):
        batch, ids, mask = (torch.full((len(rows), L), fill) for fill in (0, 3, 0))  # padding looks like an image
        spans = []
        for b, (ring, image) in enumerate(rows):
            n = ring.shape[1]
            span = slice(L - n, L) if side == "left" else slice(0, n)
            batch[b, span], ids[b, span], mask[b, span] = ring[0], image[0], 1
            spans.append(span)
        p, seen = positions(batch, ids, mask), concentric_mask(batch, ids, mask)
        assert seen.shape == (len(rows), 1, L, L) and seen.dtype == torch.bool
        following = next_position(p, mask)
        for b, (ring, image) in enumerate(rows):
            alone = positions(ring, image)
            assert p[b, spans[b]].equal(alone[0])
            assert (p[b, mask[b] == 0] == 1).all()
            assert following[b] == next_position(alone)[0]
            assert seen[b, 0, spans[b], spans[b]].equal(concentric_mask(ring, image)[0, 0])
            pads = mask[b] == 0
            assert not seen[b, 0, ~pads][:, pads].any()
            assert seen[b, 0][:, pads].sum(0).eq(1).all() and seen[b, 0].diagonal().all(), "no row may be empty"


# the mask


@pytest.mark.parametrize(
    "parts", [(5, (24, 24), 3), (0, (5, 3), 2), (2, (4, 6), 1, (3, 3), 2), (1, (2, 2), (3, 2), 1), (6,)]
)
def test_the_mask_equals_the_rule_pair_by_pair(parts):
    ring, image = sequence(*parts)
    found = concentric_mask(ring, image)
    assert found[0, 0].tolist() == seen_by_hand(ring[0].tolist(), image[0].tolist())


def test_density_of_the_image_block():
    ring, _ = sequence(5, (24, 24), 2)
    block = concentric_mask(ring)[0, 0, 5:581, 5:581].double().mean()
    assert float(block) == pytest.approx(0.5555, abs=5e-5)
    assert torch.ones(576, 576).tril().mean() == pytest.approx(0.5009, abs=5e-5)


def test_text_is_causal_and_images_see_earlier_text_and_images_only():
    ring, image = sequence(2, (3, 3), 1, (3, 3), 2)
    seen = concentric_mask(ring, image)[0, 0]
    first, second = slice(2, 11), slice(12, 21)
    assert seen[first, :2].all() and seen[21:, :21].all()
    assert not seen[first, 11:].any() and seen[second, :12].all()
    assert seen[2, 10] and not seen[2, 6], "the border's corners see each other, not the centre"
    assert seen[6, first].all()


def test_visibility_of_single_pairs_broadcasts():
    order = torch.arange(3)
    none = torch.full((3,), -1)
    found = visible(order[:, None], none[:, None], none[:, None], order, none, none)
    assert found.equal(torch.ones(3, 3).tril().bool())


# from facts to rings


def facts(ids, mask=None, token=9, **changed):
    found = Segments.infer(ids, mask, token)
    names = ("type", "image", "tile", "row", "column", "set", "member")
    return Segments(**{name: changed.get(name, getattr(found, name)) for name in names})


def test_a_run_of_placeholders_fills_the_grid_in_raster_order():
    ids = torch.tensor([[1, 9, 9, 9, 9, 9, 9, 2, 9, 9, 9, 9, 9, 9], [0, 0, 9, 9, 9, 9, 9, 9, 2, 3, 4, 5, 6, 7]])
    mask = (ids > 0).long()
    ring, image = locate(facts(ids, mask), (2, 3))
    assert image.tolist() == [[-1] + [0] * 6 + [-1] + [1] * 6, [-1, -1] + [0] * 6 + [-1] * 6]
    assert ring.equal(torch.where(image >= 0, 0, -1))
    ring, _ = locate(facts(ids, mask), (1, 6))
    assert ring.equal(torch.where(image >= 0, 0, -1))
    nine = torch.tensor([[1] + [9] * 9 + [1]])
    assert locate(facts(nine), (3, 3))[0][0, 1:10].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_known_cells_count_whatever_their_order():
    ids = torch.tensor([[9] * 9 + [1]])
    order = torch.tensor([4, 0, 8, 1, 2, 3, 5, 6, 7])
    row, column = torch.full_like(ids, -1), torch.full_like(ids, -1)
    row[0, :9], column[0, :9] = order // 3, order % 3
    for grid in (None, (3, 3)):
        ring, image = locate(facts(ids, row=row, column=column), grid)
        assert ring[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, -1] and image[0].tolist() == [0] * 9 + [-1]
    # survivors of a reducer keep the rings of the whole grid
    kept = torch.tensor([[0, 2, 9]])
    ring, _ = locate(facts(ids, row=row, column=column).take(kept), (3, 3))
    assert ring.tolist() == [[1, 0, -1]]


def test_images_of_different_grids_are_told_by_their_cells():
    ids = torch.tensor([[9] * 4 + [9] * 9])
    row = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 2, 2, 2]])
    column = torch.tensor([[0, 1, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2]])
    image = torch.tensor([[0] * 4 + [5] * 9])
    ring, found = locate(facts(ids, row=row, column=column, image=image), None)
    assert ring[0].tolist() == [0] * 4 + [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert found[0].tolist() == [0] * 4 + [1] * 9


def test_facts_without_image_ids_take_each_run_for_an_image():
    ids = torch.tensor([[9, 9, 9, 9, 1, 9, 9, 9, 9]])
    unknown = torch.full_like(ids, -1)
    assert locate(facts(ids, image=unknown), (2, 2))[1].tolist() == [[0] * 4 + [-1] + [1] * 4]


@pytest.mark.parametrize(
    "tokens, grid, cells, message",
    [
        (5, (2, 3), None, r"image 0 of sample 1 must have the cells of a 2 x 3 grid, got 5 tokens without cells"),
        (12, (2, 3), None, r"got 12 tokens without cells"),
        (4, None, None, r"a grid without gaps, got 4 tokens without cells; give each its cell"),
        (3, None, [(0, 0), (0, 1), (1, 0)], r"a grid without gaps, got 3 tokens"),
        (4, (2, 2), [(0, 0), (0, 1), (1, 0), (2, 1)], r"the cells of a 2 x 2 grid, got 4 tokens"),
    ],
)
def test_images_that_do_not_fit_their_grid_are_refused_by_name(tokens, grid, cells, message):
    ids = torch.ones(2, 14, dtype=torch.long)
    ids[1, 1 : 1 + tokens] = 9
    row, column = torch.full_like(ids, -1), torch.full_like(ids, -1)
    for j, (y, x) in enumerate(cells or []):
        row[1, 1 + j], column[1, 1 + j] = y, x
    with pytest.raises(PromptError, match=message):
        locate(facts(ids, row=row, column=column), grid)


def test_an_image_with_text_inside_is_refused():
    ids = torch.tensor([[1, 1, 1, 1, 1, 1], [9, 9, 1, 9, 9, 1]])
    image = torch.tensor([[-1] * 6, [0, 0, -1, 0, 0, -1]])
    row, column = torch.tensor([[-1] * 6, [0, 0, -1, 1, 1, -1]]), torch.tensor([[-1] * 6, [0, 1, -1, 0, 1, -1]])
    with pytest.raises(PromptError, match="each image of sample 1 must be one stretch of tokens, got 2 stretches"):
        locate(facts(ids, image=image, row=row, column=column), (2, 2))


def test_text_alone_needs_no_grid():
    ring, image = locate(facts(torch.ones(2, 5, dtype=torch.long)), None)
    assert (ring == -1).all() and (image == -1).all()
    assert positions(ring, image).equal(torch.arange(5).expand(2, -1))


def test_training_inputs_are_each_samples_own():
    family = FAMILIES["llava"]
    prompts = [family.prompt(9, seed=1), family.prompt(25, seed=2, images=2), family.prompt(30, seed=3)]
    batch = family.pad_left(prompts)
    given = training_inputs(batch["input_ids"], 97, (4, 4), batch["attention_mask"])
    L = batch["input_ids"].shape[1]
    for b, prompt in enumerate(prompts):
        alone = training_inputs(prompt["input_ids"], 97, (4, 4))
        n = prompt["input_ids"].shape[1]
        assert given["position_ids"][b, L - n :].equal(alone["position_ids"][0])
        assert given["attention_mask"][b, 0, L - n :, L - n :].equal(alone["attention_mask"][0, 0])
    starts = (batch["input_ids"] == 97).long().argmax(-1)
    assert len(set(starts.tolist())) == 3, "samples with equal starts would not tell them apart"
    with pytest.raises(PromptError, match="image 0 of sample 0 must have the cells of a 3 x 4 grid, got 16 tokens"):
        training_inputs(batch["input_ids"], 97, (3, 4), batch["attention_mask"])


def test_a_model_trains_on_these_inputs():
    family = FAMILIES["llava"]
    model = family.tiny().train()
    batch = family.pad_left([family.prompt(9, seed=1), family.prompt(20, seed=2, images=2)])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    given = training_inputs(batch["input_ids"], 97, (4, 4), batch["attention_mask"])
    loss = model(**{**batch, **given}, labels=labels, use_cache=False).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# the method on a model

OPTIONS = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
CCA = ConcentricCausalAttention()


@pytest.mark.parametrize("images", [1, 3])
def test_generation_equals_the_model_called_step_by_step(images):
    """The reference gives the whole sequence again in each step, with its positions and mask."""
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(17, images=images)
    plain = model.generate(**batch, **OPTIONS)
    with CCA.on(model) as run:
        found = model.generate(**batch, **OPTIONS)
        assert run.acted
    ids = batch["input_ids"]
    for step in range(5):
        given = training_inputs(ids, 97, (4, 4))
        with torch.no_grad():
            logits = model(
                input_ids=ids, pixel_values=batch["pixel_values"], use_cache=False, **given
            ).logits[:, -1]  # fmt: skip
        torch.testing.assert_close(found.scores[step], logits, **family.tolerance)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert found.sequences.equal(ids)
    assert (found.scores[0] - plain.scores[0]).abs().max() > 0.01
    again = model.generate(**batch, **OPTIONS)
    assert all(a.equal(b) for a, b in zip(again.scores, plain.scores, strict=True))


def test_every_row_of_a_plain_forward_equals_training():
    family = FAMILIES["llava"]
    model = family.tiny()
    batch = family.pad_left([family.prompt(9, seed=1), family.prompt(25, seed=2, images=2), family.prompt(30, seed=3)])
    given = training_inputs(batch["input_ids"], 97, (4, 4), batch["attention_mask"])
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = model(**{**batch, **given}, use_cache=False).logits
        for use_cache in (False, True):
            with CCA.on(model):
                found = model(**batch, use_cache=use_cache).logits
            torch.testing.assert_close(found[real], wanted[real], **family.tolerance)


def test_padded_prompts_equal_each_alone():
    family = FAMILIES["llava"]
    model = family.tiny()
    prompts = [family.prompt(9, seed=1), family.prompt(25, seed=2, images=3), family.prompt(20, seed=3, images=2)]
    with CCA.on(model):
        together = model.generate(**family.pad_left(prompts), **OPTIONS)
        for b, batch in enumerate(prompts):
            alone = model.generate(**batch, **OPTIONS)
            assert together.sequences[b, -5:].equal(alone.sequences[0, -5:])
            for ours, theirs in zip(together.scores, alone.scores, strict=True):
                torch.testing.assert_close(ours[b], theirs[0], **family.tolerance)


def test_text_only_prompts_stay_plain():
    for name in ("llama", "llava"):
        family = FAMILIES[name]
        model, batch = family.tiny(), family.prompt(20, images=0)
        plain = model.generate(**batch, **OPTIONS)
        with CCA.on(model):
            same = model.generate(**batch, **OPTIONS)
        torch.testing.assert_close(same.scores, plain.scores, **family.tolerance)


def drawn(n, start, grid):
    """Facts of a prompt of n tokens whose visual tokens start there, with their cells."""
    Hg, Wg = grid
    kind, image, row, column = (torch.full((1, n), fill) for fill in (TEXT, -1, -1, -1))
    span = slice(start, start + Hg * Wg)
    kind[0, span], image[0, span] = IMAGE, 0
    row[0, span] = torch.arange(Hg).repeat_interleave(Wg)
    column[0, span] = torch.arange(Wg).repeat(Hg)
    unknown = torch.full((1, n), -1)
    return Segments(kind, image, unknown, row, column, unknown, unknown)


@pytest.mark.parametrize("name", ["llama", "qwen3", "neox", "gemma2"])
@pytest.mark.parametrize("grid", [(3, 3), (2, 5)])
def test_a_text_model_takes_bound_cells(name, grid):
    family = FAMILIES[name]
    model, batch = family.tiny(), family.prompt(11 if name == "gemma2" else 20)  # inside gemma's window of 12
    n = batch["input_ids"].shape[1]
    bound = drawn(n, 1, grid)
    ring, image = locate(bound, None)
    mask = concentric_mask(ring, image)
    extra = torch.where(mask, 0.0, torch.finfo(torch.float32).min)  # added by eager attention
    with torch.no_grad():
        wanted = model(
            batch["input_ids"], attention_mask=extra, position_ids=positions(ring, image), use_cache=False
        ).logits  # fmt: skip
        with CCA.on(model) as run:
            run.bind(bound)
            found = model(**batch).logits
        plain = model(**batch).logits
    torch.testing.assert_close(found, wanted, **family.tolerance)
    assert (found - plain).abs().max() > 0.01


def test_images_of_a_later_turn_are_causal_towards_earlier_ones():
    family = FAMILIES["llama"]
    model, batch = family.tiny(), family.prompt(30)
    ids = batch["input_ids"]
    first, second = drawn(15, 2, (3, 3)), drawn(15, 3, (3, 3))
    both = Segments(
        **{
            name: torch.cat([getattr(first, name), getattr(second, name) + (name == "image") * (second.image >= 0)], 1)
            for name in ("type", "image", "tile", "row", "column", "set", "member")
        }
    )
    with torch.no_grad():
        with CCA.on(model) as run:
            run.bind(both)
            wanted = model(ids).logits
        with CCA.on(model) as run:
            run.bind(first)
            model(ids[:, :15], use_cache=True)
            run.begin_prompt()
            run.bind(second)
            found = model(ids[:, 15:], cache=run.cache).logits
            run.bind(first)  # a new prompt starts to count anew
            model(ids[:, :15], use_cache=True)
            run.begin_prompt()
            run.bind(second)
            again = model(ids[:, 15:], cache=run.cache).logits
    torch.testing.assert_close(found, wanted[:, 15:], **family.tolerance)
    assert again.equal(found)


def test_survivors_of_a_reducer_keep_their_rings():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(17)
    with torch.no_grad(), (FoPru(budget=0.5) | CCA).on(model) as run:
        found = model(**batch).logits
        kept = run.rows[0]
    ids = batch["input_ids"]
    segments = Segments.infer(ids, None, 97, (4, 4)).take(torch.tensor([kept]))
    ring, image = locate(segments, (4, 4))
    assert int((image >= 0).sum()) == 8
    seen = concentric_mask(ring, image)
    with torch.no_grad():
        features = model.model.get_image_features(batch["pixel_values"]).pooler_output
        embeds = model.get_input_embeddings()(ids)
        embeds = embeds.masked_scatter((ids == 97)[..., None], torch.cat(tuple(features)))[:, kept]
        hidden = model.model.language_model(
            inputs_embeds=embeds, attention_mask=seen, position_ids=positions(ring, image), use_cache=False
        ).last_hidden_state  # fmt: skip
        wanted = model.lm_head(hidden)
    torch.testing.assert_close(found, wanted, **family.tolerance)


def test_an_image_cache_serves_many_questions():
    family = FAMILIES["llama"]
    model, batch = family.tiny(), family.prompt(20)
    ids, bound = batch["input_ids"], drawn(20, 2, (3, 3))
    with torch.no_grad():
        with CCA.on(model) as run:
            run.bind(bound)
            wanted = model(ids).logits
        with CCA.on(model) as run:
            run.bind(drawn(11, 2, (3, 3)))
            model(ids[:, :11], use_cache=True)
            run.end_prompt()
            steps = [model(ids[:, j : j + 1], cache=run.cache).logits for j in range(11, 20)]
    torch.testing.assert_close(torch.cat(steps, 1), wanted[:, 11:], **family.tolerance)


def test_what_cannot_work_is_refused():
    for name in ("gpt2", "qwen25_vl", "llava_next", "llava_onevision"):
        with pytest.raises(UnsupportedModel, match="ConcentricCausalAttention"):
            CCA.on(FAMILIES[name].tiny())
    family = FAMILIES["llama"]
    model, batch = family.tiny(), family.prompt(20)
    for bound, message in (
        (drawn(15, 2, (3, 3)), "segments must cover the prompt's 20 tokens, got 15"),
        (drawn(20, 2, (3, 3)).take(torch.arange(20)[None].clamp(max=9)), "a grid without gaps"),
    ):
        with pytest.raises(PromptError, match=message), CCA.on(model) as run:
            run.bind(bound)
            model(**batch)
    with pytest.raises(PromptError, match="attach without chunk"), CCA.on(model, chunk=8) as run:
        run.bind(drawn(20, 2, (3, 3)))
        model.generate(**batch, max_new_tokens=2)
    with CCA.on(model, chunk=8):  # text alone may come in chunks
        model.generate(**batch, max_new_tokens=2)


def test_it_has_no_setting_that_changes_nothing():
    assert CCA.identity() is None
    assert str(CCA) == "ConcentricCausalAttention()" and ConcentricCausalAttention.parse(str(CCA)) == CCA
