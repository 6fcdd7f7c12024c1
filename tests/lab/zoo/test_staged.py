import copy

import pytest
import torch
from transformers import LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from seqwise.lab.zoo import staged

IMAGE = slice(1, 37)


def states(model: LlavaForConditionalGeneration, ids: torch.Tensor, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Residual stream before layer 1, after layers 1, 2, ... of a prompt with given projected features (B, k, 64)."""
    ready = BaseModelOutputWithPooling(pooler_output=list(features))
    with torch.no_grad():
        out = model(input_ids=ids, mm_encoder_outputs={"image": ready}, output_hidden_states=True, use_cache=False)
    return out.hidden_states


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return staged.build(0)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(2, 36, 64, generator=torch.Generator().manual_seed(5))


IDS = staged.batch(2, seed=1).input_ids


def test_the_image_holds_what_the_answers_say():
    drawn = staged.batch(40, seed=3)
    grey = drawn.pixel_values.mean(1)
    for b in range(40):
        for j, position in enumerate(drawn.asked.tolist()):
            assert drawn.input_ids[b, position - 1] == staged.Q_ID
            key = int(drawn.input_ids[b, position]) - staged.KEY_ID
            r, c = divmod(int(drawn.objects[b, key]), 6)
            patch = grey[b, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]
            likeness = (staged.VALUE_PATTERNS * patch[:, 2:]).sum((1, 2))
            assert drawn.answers[b, j] == staged.VALUE_ID + int(likeness.argmax())
            assert (staged.KEY_PATTERNS * patch[:, :2]).sum((1, 2)).argmax() == key


def test_patterns_differ_in_at_least_half_of_their_pixels():
    for patterns in (staged.KEY_PATTERNS, staged.VALUE_PATTERNS):
        for i in range(len(patterns)):
            for j in range(i):
                assert (patterns[i] != patterns[j]).sum() >= 4


def test_text_sees_the_image_from_layer_3_on(model, features):
    before, after = states(model, IDS, features), states(model, IDS, -features)
    for depth in (1, 2):
        assert before[depth][:, 37:].equal(after[depth][:, 37:])
    assert not torch.allclose(before[3][:, 37:], after[3][:, 37:])


def test_image_rows_see_only_themselves_and_what_precedes_the_image(model, features):
    changed = features.clone()
    changed[:, 7] += 1.0
    before, after = states(model, IDS, features), states(model, IDS, changed)
    moved = ~torch.isclose(before[2], after[2], atol=1e-6).all(-1)  # (B, rows)
    assert moved.nonzero().tolist() == [[0, 8], [1, 8]]
    other = IDS.clone()
    other[:, 0] = staged.Q_ID
    moved = ~torch.isclose(before[1], states(model, other, features)[1], atol=1e-6).all(-1)
    assert moved[:, IMAGE].all()


def test_layer_1_equals_dense_attention_under_the_mask_in_the_text(model, features):
    hidden = states(model, IDS, features)
    layer = model.model.language_model.layers[0]
    n = IDS.shape[1]
    seen = torch.ones(n, n).tril().bool()
    seen[37:, IMAGE] = False
    seen[IMAGE, IMAGE] = torch.eye(36).bool()
    x = hidden[0]
    rope = model.model.language_model.rotary_emb(x, torch.arange(n)[None])
    plain = copy.deepcopy(layer)
    plain.self_attn._forward_pre_hooks.clear()
    bias = torch.zeros(1, 1, n, n).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        wanted = plain(x, attention_mask=bias, position_embeddings=rope)
    torch.testing.assert_close(hidden[1], wanted)


def test_rows_may_be_dropped_between_layers(model, features):
    kept = torch.tensor([0, 2, 3, 20, 36, *range(37, IDS.shape[1])])  # BOS, four image rows, the text

    def cut(layer, args, kwargs):
        rope = tuple(part[:, kept] for part in kwargs["position_embeddings"])
        changed = {"position_embeddings": rope, "position_ids": kwargs["position_ids"][:, kept], "attention_mask": None}
        return (args[0][:, kept],), kwargs | changed

    class LayerTwoDone(Exception):
        pass

    def stop(layer, args, output):  # later layers would get the uncut positions again; handing them on is not tested
        raise LayerTwoDone(output)

    whole = states(model, IDS, features)[2]
    layer = model.model.language_model.layers[1]
    hooks = [
        layer.register_forward_pre_hook(cut, with_kwargs=True),
        layer.register_forward_hook(stop),
    ]
    try:
        with pytest.raises(LayerTwoDone) as done:
            states(model, IDS, features)
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(done.value.args[0], whole[:, kept])


def test_left_padding_changes_nothing(model):
    drawn = staged.batch(2, seed=4)
    padded = torch.cat([torch.full((2, 3), staged.Q_ID), drawn.input_ids], 1)
    padded[1] = torch.cat([drawn.input_ids[1], torch.tensor([staged.Q_ID, staged.KEY_ID, staged.Q_ID])])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    with torch.no_grad():
        together = model(input_ids=padded, attention_mask=mask, pixel_values=drawn.pixel_values).logits
        short = model(input_ids=padded[:1, 3:], pixel_values=drawn.pixel_values[:1]).logits
        long = model(input_ids=padded[1:], pixel_values=drawn.pixel_values[1:]).logits
    torch.testing.assert_close(together[:1, 3:], short, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[1:], long, atol=1e-5, rtol=1e-4)


def test_decoding_with_a_cache_equals_one_forward(model):
    drawn = staged.batch(2, seed=6)
    prompt = drawn.input_ids[:, :39]
    options = {"pixel_values": drawn.pixel_values, "do_sample": False, "max_new_tokens": 4}
    out = model.generate(prompt, return_dict_in_generate=True, output_logits=True, **options)
    with torch.no_grad():
        whole = model(input_ids=out.sequences, pixel_values=drawn.pixel_values, use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, 38:42], atol=1e-5, rtol=1e-4)


def test_eager_attention_agrees(model, features):
    wanted = states(model, IDS, features)[-1]
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    torch.testing.assert_close(states(eager, IDS, features)[-1], wanted, atol=1e-5, rtol=1e-4)


def test_a_copy_counts_for_itself(model, features):
    twin = copy.deepcopy(model)
    before = states(twin, IDS, features)
    states(model, IDS[:, :39], features)
    after = states(twin, IDS, features)
    assert all(a.equal(b) for a, b in zip(before, after, strict=True))
    blind = [hook.__self__ for hook in twin._forward_pre_hooks.values()]
    own = [hook.__self__ for hook in model._forward_pre_hooks.values()]
    assert blind[0] is not own[0]
    assert blind[0] is next(iter(twin.model.language_model.layers[0].self_attn._forward_pre_hooks.values())).__self__


def test_what_hides_the_image_is_refused(model):
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 5, 64))
    blind = next(iter(model._forward_pre_hooks.values())).__self__
    attention = model.model.language_model.layers[0].self_attn
    call = {"hidden_states": torch.zeros(1, 5, 64), "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])}
    with pytest.raises(ValueError, match="padding mask of 7 columns for 5 slots"):
        blind._restrict(attention, (), call)


def test_the_loss_of_the_answers_does_not_train_the_tower(monkeypatch):
    monkeypatch.setattr(staged, "_tower_loss", lambda feature, heads, drawn: 0.0)
    before, after = staged.build(0).state_dict(), staged.train(0, steps=1).state_dict()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and not any(name.startswith("model.vision_tower.") for name in changed)


def test_training_lowers_the_loss_and_is_reproducible():
    losses: list[float] = []
    state = torch.get_rng_state()
    model = staged.train(0, progress=lambda step, loss: losses.append(loss), steps=20)
    assert torch.get_rng_state().equal(state)
    assert not model.training and len(losses) == 20
    assert not model.model.multi_modal_projector._forward_pre_hooks  # features are detached in training only
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.3
    again, other = staged.train(0, steps=2).state_dict(), staged.train(0, steps=2).state_dict()
    assert all(again[key].equal(other[key]) for key in again)


def test_accuracy_counts_every_question():
    model, drawn = staged.build(0), staged.batch(4, seed=2)
    with torch.no_grad():
        out = model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values)
    told = out.logits[:, drawn.asked].argmax(-1)  # (4, 6)
    wrong = torch.where(torch.arange(24).view(4, 6) < 6, told + 1, told)
    assert staged.accuracy(model, drawn._replace(answers=wrong)) == 0.75


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: staged.batch(0, 1), "n must be >= 1, got 0"),
        (lambda: staged.batch(1, 1, questions=0), "questions must be >= 1, got 0"),
        (lambda: staged.train(0, steps=0), "steps must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
