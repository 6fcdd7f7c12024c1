import copy
import random
import re

import pytest
import torch
from transformers import AutoProcessor

from seqwise.lab.zoo import scenes, scenes_data, scenes_train
from seqwise.lab.zoo.scenes_data import COLOURS, NUMBERS, PLURALS, SHAPES

KEPT = 8  # an eighth of the 64 patches


@pytest.fixture(scope="module")
def shipped():
    return scenes.load()


@pytest.fixture(scope="module")
def held_out():
    return scenes.scenes(200, seed=41)


# ---- the drawings


def cell(pixels: torch.Tensor, patch: int) -> torch.Tensor:  # (3, 6, 6)
    r, c = divmod(patch, 8)
    return pixels[:, 6 * r : 6 * r + 6, 6 * c : 6 * c + 6].float() / 255


def test_objects_are_drawn_where_the_facts_say():
    for example in scenes.scenes(60, seed=3):
        for k, thing in enumerate(example.things[0]):
            assert tuple((example.owner[0] == k).nonzero()[:, 0].tolist()) == thing.patches
            canvas = torch.cat([torch.cat([cell(example.pixels[0], p) for p in row], 2) for row in rows(thing)], 1)
            shown = canvas - canvas.mean(0)  # grey ground has no colour
            vivid = shown.square().sum(0) > 0.06
            likeness = [(mask(shape, thing.large) == vivid).float().mean().item() for shape in range(4)]
            assert max(range(4), key=likeness.__getitem__) == thing.shape and max(likeness) > 0.85
            ink = canvas[:, vivid].mean(1)
            assert int((ink / ink.norm() @ (UNIT).T).argmax()) == thing.colour


UNIT = torch.nn.functional.normalize(
    torch.tensor(
        [[0.9, 0.15, 0.15], [0.15, 0.8, 0.2], [0.2, 0.3, 0.95], [0.95, 0.9, 0.15], [0.75, 0.2, 0.85], [0.15, 0.85, 0.9]]
    )
)


def rows(thing: scenes_data.Thing) -> list[tuple[int, ...]]:
    return [thing.patches[:2], thing.patches[2:]] if thing.large else [thing.patches]


def mask(shape: int, large: bool) -> torch.Tensor:
    side = 12 if large else 6
    centre = (side - 1) / 2
    drawn = torch.zeros(side, side, dtype=torch.bool)
    for y in range(side):
        for x in range(side):
            u, v = (x - centre) / (side / 2), (y - centre) / (side / 2)
            drawn[y, x] = [
                u * u + v * v <= 0.75,
                max(abs(u), abs(v)) <= 0.9,
                abs(u) <= (v + 1.2) / 2,
                min(abs(u), abs(v)) <= 0.34,
            ][shape]
    return drawn


def test_patches_without_an_object_are_grey_and_some_carry_marks():
    drawn = scenes_data.compose(100, torch.Generator().manual_seed(1))
    marked = []
    for pixels, owner in zip(drawn.pixels, drawn.owner, strict=True):
        empty = torch.stack([cell(pixels, p) for p in range(64) if owner[p] < 0])  # (cells, 3, 6, 6)
        assert (empty.mean((2, 3)) - empty.mean((1, 2, 3))[:, None]).abs().max() < 0.06
        marked.append(int((empty.mean(1).flatten(1).sort(-1).values[:, -4:].mean(-1) > 0.46).sum()))
    assert min(marked) >= 2 and max(marked) <= 7


def test_scenes_hold_two_to_four_kinds_that_do_not_overlap():
    drawn = scenes_data.compose(300, torch.Generator().manual_seed(2))
    counts, large = set(), 0
    for things, owner, part in zip(drawn.things(), drawn.owner, drawn.part, strict=True):
        counts.add(len(things))
        large += sum(thing.large for thing in things)
        assert len({thing[:2] for thing in things}) == len(things)
        covered = [patch for thing in things for patch in thing.patches]
        assert len(set(covered)) == len(covered) == int((owner >= 0).sum()) == int((part >= 0).sum())
        for thing in things:
            assert part[list(thing.patches)].tolist() == ([1, 2, 3, 4] if thing.large else [0])
    assert counts == {2, 3, 4}
    assert 0.2 < large / sum(map(len, drawn.things())) < 0.35


def test_examples_are_a_function_of_the_seed_alone_and_grow_at_the_end():
    first = scenes.scenes(10, seed=7)
    torch.manual_seed(99)
    random.seed(5)
    for short, long in zip(first, scenes.scenes(100, seed=7), strict=False):
        assert short.pixels.equal(long.pixels) and (short.prompt, short.answer) == (long.prompt, long.answer)
    assert not first[0].pixels.equal(scenes.scenes(1, seed=8)[0].pixels)
    for make in (scenes.multi, scenes.frames):
        a, b = make(5, seed=1), make(5, seed=1)
        assert all(x.pixels.equal(y.pixels) and x.prompt == y.prompt for x, y in zip(a, b, strict=True))


# ---- the questions, answered again from their words


def derive(question: str, pictures: tuple[tuple[scenes_data.Thing, ...], ...]) -> tuple[str, list[tuple[int, int]]]:
    """The answer and the (image, object) pairs that the question is about, from its words."""
    named = re.fullmatch(r"(.*) in picture (\w+) \?", question)
    if named:
        only = NUMBERS.index(named[2]) - 1
        question = f"{named[1]} ?"
    scope = [(i, k) for i in range(len(pictures)) for k in range(len(pictures[i])) if not named or i == only]

    def find(words: str) -> list[tuple[int, int]]:
        colour = next((COLOURS.index(w) for w in words.split() if w in COLOURS), None)
        shape = next((i for i in range(4) if {SHAPES[i], PLURALS[i]} & set(words.split())), None)
        size = next((w == "large" for w in words.split() if w in ("large", "small")), None)
        return [
            (i, k)
            for i, k in scope
            if colour in (None, pictures[i][k].colour)
            and shape in (None, pictures[i][k].shape)
            and size in (None, pictures[i][k].large)
        ]

    def only_one(words: str) -> tuple[int, int]:
        (one,) = find(words)
        return one

    def middle(one: tuple[int, int]) -> tuple[float, float]:
        patches = pictures[one[0]][one[1]].patches
        return sum(p // 8 for p in patches) / len(patches), sum(p % 8 for p in patches) / len(patches)

    if match := re.fullmatch(r"is there a (.*) \?", question):
        return ("yes" if find(match[1]) else "no"), find(match[1])
    if match := re.fullmatch(r"what colour is the (.*) \?", question):
        i, k = only_one(match[1])
        return COLOURS[pictures[i][k].colour], [(i, k)]
    if match := re.fullmatch(r"how many (.*) \?", question):
        return NUMBERS[len(find(match[1]))], find(match[1])
    if match := re.fullmatch(r"where is the (.*) \?", question):
        row, column = middle(only_one(match[1]))
        assert row != 3.5 and column != 3.5
        return f"{'bottom' if row > 3.5 else 'top'}-{'right' if column > 3.5 else 'left'}", [only_one(match[1])]
    match = re.fullmatch(r"is the (.*) (left of|right of|above|below) the (.*) \?", question)
    a, b = only_one(match[1]), only_one(match[3])
    axis = 1 if match[2].endswith("of") else 0
    step = middle(b)[axis] - middle(a)[axis]
    assert abs(step) >= 2
    return ("yes" if (step > 0) == (match[2] in ("left of", "above")) else "no"), [a, b]


VARIANTS = [scenes.scenes, scenes.multi, scenes.frames]


@pytest.mark.parametrize("make", VARIANTS, ids=lambda make: make.__name__)
def test_answers_and_relevant_patches_follow_from_the_words(make):
    for example in make(300, seed=11):
        answer, about = derive(example.question, example.things)
        assert example.answer == answer, example.prompt
        wanted = [64 * i + patch for i, k in about for patch in example.things[i][k].patches]
        assert sorted(example.relevant) == sorted(wanted)
        firsts = [64 * i + example.things[i][k].patches[0] for i, k in about]
        assert sorted(example.relevant[: len(about)]) == sorted(firsts)
        images = {i for i, _ in about}
        assert example.needle == (images.pop() if len(images) == 1 else -1)
        assert example.prompt.endswith(example.question)
        assert example.prompt.count("<image>") == len(example.pixels) == len(example.things) == len(example.owner)


@pytest.mark.parametrize("make", VARIANTS, ids=lambda make: make.__name__)
def test_types_take_turns_and_answers_are_balanced(make):
    examples = make(900, seed=12)
    types = scenes.TYPES if make is scenes.scenes else ("presence", "colour", "place")
    assert [example.type for example in examples[: len(types)]] == list(types)
    for kind in types:
        of_type = [example.answer for example in examples if example.type == kind]
        assert abs(len(of_type) - 900 / len(types)) < 1
        shares = {answer: of_type.count(answer) / len(of_type) for answer in of_type}
        assert (
            max(shares.values()) < {"presence": 0.6, "colour": 0.3, "count": 0.35, "place": 0.35, "relation": 0.6}[kind]
        )
        assert len(shares) == {"presence": 2, "colour": 6, "count": 5, "place": 4, "relation": 2}[kind]


def test_many_absent_objects_mix_a_colour_and_a_shape_of_the_scene():
    near = []
    for example in scenes.scenes(1000, seed=13, types=("presence",)):
        if example.answer == "no":
            words = example.question.split()
            things = example.things[0]
            near.append(
                any(COLOURS[thing.colour] in words for thing in things)
                and any(SHAPES[thing.shape] in words for thing in things)
            )
    assert 0.33 < sum(near) / len(near) < 0.5


def test_pictures_are_named_and_half_of_the_questions_name_one():
    examples = scenes.multi(300, seed=14)
    assert {len(example.pixels) for example in examples} == {2, 3, 4}
    assert examples[0].prompt.startswith("<image> picture one . <image> picture two .")
    assert 0.4 < sum("in picture" in example.question for example in examples) / 300 < 0.6


def test_frames_follow_each_other_and_ask_for_large_objects():
    examples = scenes.frames(300, seed=15, images=(4,))
    assert {len(example.pixels) for example in examples} == {4}
    for example in examples:
        assert example.prompt.startswith("<image> <image> <image> <image> ")
        asked = [thing for scene in example.things for thing in scene if thing.name in example.question]
        assert not asked or any(thing.large for thing in asked)
        shapes = [{thing.shape for thing in scene} for scene in example.things]
        assert any(one - set().union(*shapes[:i], *shapes[i + 1 :]) for i, one in enumerate(shapes))


# ---- tokenizer, processor, batches


def test_every_word_of_the_questions_is_a_token_and_comes_back():
    tokenizer = scenes.processor().tokenizer
    for make in VARIANTS:
        for example in make(150, seed=16):
            ids = tokenizer.encode(f"{example.question} {example.answer}", add_special_tokens=False)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == f"{example.question} {example.answer}"
            assert len(tokenizer.encode(example.answer, add_special_tokens=False)) == 1
    assert tokenizer.encode("Is there a red circle?") == tokenizer.encode("is there a red circle ?")
    assert tokenizer.decode(tokenizer.encode("a pink circle")) == "<bos> a <unk> circle"
    assert len(set(tokenizer.get_vocab().values())) == len(tokenizer) == scenes.build(0).config.text_config.vocab_size


@pytest.mark.parametrize("make", VARIANTS, ids=lambda make: make.__name__)
def test_the_processor_makes_the_same_batch_from_images_and_words(make, tmp_path):
    from PIL import Image

    examples = make(5, seed=17)
    drawn, processor = scenes.batch(examples), scenes.processor()
    images = []
    for b, example in enumerate(examples):
        for i, image in enumerate(example.images()):
            image.save(tmp_path / f"{b}-{i}.png")
        images.append([Image.open(tmp_path / f"{b}-{i}.png") for i in range(len(example.pixels))])
    made = processor(images=images, text=[e.prompt for e in examples], padding=True, return_tensors="pt")
    assert made["input_ids"].equal(drawn.input_ids) and made["attention_mask"].equal(drawn.attention_mask)
    torch.testing.assert_close(made["pixel_values"], drawn.pixel_values, atol=1e-6, rtol=0)
    alone = processor.apply_chat_template(
        examples[0].messages(), tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    real = drawn.attention_mask[0].bool()
    assert alone["input_ids"][0].equal(drawn.input_ids[0, real])
    assert drawn.attention_mask.diff(dim=-1).min() >= 0  # padding on the left


def test_a_conversation_ends_each_answer():
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many objects ?"}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "where is the red circle ?"},
    ]
    text = scenes.processor().apply_chat_template(chat, add_generation_prompt=True)
    assert text == "<bos> <image> how many objects ? two <eos> where is the red circle ?"


def test_model_and_processor_can_be_saved_and_loaded_again(shipped, tmp_path):
    model, processor = shipped
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    example = scenes.scenes(1, seed=18)[0]
    made = again(images=example.images(), text=example.prompt, return_tensors="pt")
    wanted = processor(images=example.images(), text=example.prompt, return_tensors="pt")
    assert made["input_ids"].equal(wanted["input_ids"]) and made["pixel_values"].equal(wanted["pixel_values"])
    model.save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path)
    assert twin.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


# ---- the model


def test_the_model_has_the_shapes_that_the_text_promises():
    model = scenes.build(0)
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.num_hidden_layers, text.num_hidden_layers) == (5, 5)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (4, 2, 32)
    (one,) = scenes.features(model, scenes.scenes(1, seed=1))[0]
    assert one.shape == (64, text.hidden_size)


def test_training_features_are_those_that_the_model_uses():
    model, drawn = scenes.build(0), scenes.batch(scenes.scenes(2, seed=1))
    with torch.no_grad():
        wanted = model.model.vision_tower(drawn.pixel_values, output_hidden_states=True).hidden_states[-2]
        assert scenes_train._feature_states(model, drawn.pixel_values).equal(wanted)


def test_the_training_loss_is_that_of_the_plain_model():
    model = scenes.build(0)
    drawn = scenes_data.compose(2, torch.Generator().manual_seed(3))
    turns = [[("how many objects ?", "two"), ("is there a red circle ?", "no")], [("how many circles ?", "zero")]]
    x, tokenizer = scenes_train._patch_features(model, drawn), scenes.processor().tokenizer
    with torch.no_grad():
        got = scenes_train._loss_of_turns(model, [x], "<image>", turns)
        answers, others = [], []
        for b, one in enumerate(turns):
            text = "<image> " + " ".join(f"{words} {answer} <eos>" for words, answer in one)
            ids = torch.tensor([tokenizer.encode(text.replace("<image>", "<image>" * 64))])
            values = scenes.pixel_values(drawn.pixels[b : b + 1])
            told = model(input_ids=ids, pixel_values=values).logits[0].log_softmax(-1)
            for at in range(65, ids.shape[1]):
                is_answer = at + 1 < ids.shape[1] and ids[0, at + 1] == tokenizer.eos_token_id
                (answers if is_answer else others).append(-told[at - 1, ids[0, at]])
    wanted = torch.stack(answers).mean() + 0.5 * torch.stack(others).mean()
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_resizing_equals_two_weights_per_axis():
    x = torch.randn(2, 64, 5, generator=torch.Generator().manual_seed(0))
    assert scenes.resize(x, (8, 8)).allclose(x)
    torch.testing.assert_close(
        scenes.resize(x, (4, 4)), x.unflatten(1, (4, 2, 4, 2)).mean((2, 4)).flatten(1, 2), atol=1e-6, rtol=1e-5
    )
    got, square = scenes.resize(x[0], (3, 5)), x[0].unflatten(0, (8, 8))
    for i in range(3):
        for j in range(5):
            r, c = (i + 0.5) * 8 / 3 - 0.5, (j + 0.5) * 8 / 5 - 0.5
            a, b = int(r), int(c)
            top = square[a, b] * (b + 1 - c) + square[a, b + 1] * (c - b)
            low = square[a + 1, b] * (b + 1 - c) + square[a + 1, b + 1] * (c - b)
            torch.testing.assert_close(got[5 * i + j], top * (a + 1 - r) + low * (r - a), atol=1e-5, rtol=1e-4)


def test_training_lowers_the_loss_is_reproducible_and_leaves_the_tower_alone_in_stage_2():
    losses: list[tuple[int, float]] = []
    state = torch.get_rng_state()
    model = scenes.train(0, progress=lambda step, loss: losses.append((step, loss)), steps=(4, 3))
    assert torch.get_rng_state().equal(state)
    assert not model.training and [step for step, _ in losses] == list(range(1, 8))
    assert losses[3][1] < losses[0][1] - 0.3 and losses[6][1] < losses[4][1] - 0.2
    again = scenes.train(0, steps=(4, 1)).state_dict()
    tower = [name for name in again if name.startswith("model.vision_tower.")]
    assert tower and all(again[name].equal(value) for name, value in model.state_dict().items() if name in tower)
    assert not any(again[name].equal(scenes.build(0).state_dict()[name]) for name in tower if "layers.2" in name)


def test_accuracy_counts_answers():
    model, examples = scenes.build(0), scenes.scenes(8, seed=2)
    told = scenes.answers(model, examples)
    wrong = [copy.copy(example) for example in examples]
    for i, example in enumerate(wrong):
        object.__setattr__(example, "answer", told[i] if i < 6 else "picture")
    assert scenes.accuracy(model, wrong) == 0.75


# ---- the shipped weights


def eighth(examples, features, order):
    """The 8 visual tokens per image that come first in `order(example, b)`, in raster order."""
    return [
        [one[torch.tensor(sorted(order(example, b)[:KEPT]))] for one in every]
        for b, (example, every) in enumerate(zip(examples, features, strict=True))
    ]


def right_order(example, b):
    objects = [patch for patch in range(64) if example.owner[0, patch] >= 0]
    return list(dict.fromkeys([*example.relevant, *objects, *range(64)]))


def random_order(example, b):
    return random.Random(b).sample(range(64), 64)


def test_the_weights_are_small_and_in_half_precision():
    from safetensors.torch import load_file

    assert scenes.WEIGHTS.stat().st_size < 2.5e6
    assert {value.dtype for value in load_file(scenes.WEIGHTS).values()} == {torch.float16}


def test_held_out_questions_are_answered(shipped, held_out):
    model, _ = shipped
    assert not model.training and model.dtype == torch.float32
    told = scenes.answers(model, held_out)
    right = [word == example.answer for word, example in zip(told, held_out, strict=True)]
    assert sum(right) / len(right) > 0.9
    for kind in scenes.TYPES:
        assert sum(r for r, example in zip(right, held_out, strict=True) if example.type == kind) / 40 > 0.75, kind


def test_the_answer_needs_the_objects_patches(shipped, held_out):
    model, _ = shipped
    every = scenes.features(model, held_out)
    whole = scenes.accuracy(model, held_out, every)
    assert whole == scenes.accuracy(model, held_out)
    right = scenes.accuracy(model, held_out, eighth(held_out, every, right_order))
    by_chance = scenes.accuracy(model, held_out, eighth(held_out, every, random_order))
    assert right > whole - 0.03
    assert by_chance < whole - 0.15


def test_cls_attention_finds_the_objects(shipped, held_out):
    model, _ = shipped
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        seen = tower(scenes.batch(held_out).pixel_values, output_attentions=True).attentions[-2]  # (B, h, 65, 65)
    cls = seen[:, :, 0, 1:].mean(1)  # (B, 64)
    every = scenes.features(model, held_out)
    order = cls.argsort(-1, descending=True).tolist()
    by_cls = scenes.accuracy(model, held_out, eighth(held_out, every, lambda example, b: order[b]))
    by_chance = scenes.accuracy(model, held_out, eighth(held_out, every, random_order))
    assert by_cls > by_chance + 0.15
    assert by_cls > scenes.accuracy(model, held_out) - 0.1


@pytest.mark.parametrize("make", VARIANTS[1:], ids=lambda make: make.__name__)
def test_several_images_are_told_apart(shipped, make):
    assert scenes.accuracy(shipped[0], make(120, seed=42)) > 0.85


def test_frames_may_have_small_grids(shipped):
    examples = scenes.frames(120, seed=43)
    draw = random.Random(0)
    every = [
        [scenes.resize(one, (draw.randint(3, 8), draw.randint(3, 8))) for one in images]
        for images in scenes.features(shipped[0], examples)
    ]
    assert scenes.accuracy(shipped[0], examples, every) > 0.8


def test_generate_ends_after_the_word_and_padding_changes_nothing(shipped):
    model, processor = shipped
    examples = [*scenes.scenes(4, seed=44), *scenes.multi(2, seed=44)]
    drawn = scenes.batch(examples)
    made = model.generate(**drawn.inputs(), max_new_tokens=4, do_sample=False)[:, drawn.input_ids.shape[1] :]
    told = scenes.answers(model, examples)
    assert processor.batch_decode(made, skip_special_tokens=True) == told
    assert made[:, 1].eq(processor.tokenizer.eos_token_id).all()
    assert told == [scenes.answers(model, [example])[0] for example in examples]


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: scenes.scenes(0, 1), "scenes: n must be >= 1, got 0"),
        (lambda: scenes.multi(0, 1), "multi: n must be >= 1, got 0"),
        (lambda: scenes.frames(0, 1), "frames: n must be >= 1, got 0"),
        (lambda: scenes.scenes(1, 1, types=("size",)), "scenes: types must be some of presence, colour, .*'size'"),
        (lambda: scenes.multi(1, 1, types=("count",)), "multi: types must be some of presence, colour, place"),
        (lambda: scenes.frames(1, 1, images=(1,)), r"frames: images must be numbers from 2 to 4, got \(1,\)"),
        (lambda: scenes.multi(1, 1, images=()), r"multi: images must be numbers from 2 to 4, got \(\)"),
        (lambda: scenes.batch([]), "batch: examples must hold at least one"),
        (lambda: scenes.train(0, steps=(1, 0)), r"steps must be >= 1 in both stages, got \(1, 0\)"),
    ],
)
def test_bad_arguments_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
