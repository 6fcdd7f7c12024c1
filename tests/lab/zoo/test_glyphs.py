import pytest
import torch

from seqwise.lab.zoo import glyphs


def patches(drawn: glyphs.GlyphBatch) -> torch.Tensor:  # (B, 36, 3, 4, 4)
    image = drawn.pixel_values
    return torch.stack([image[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] for r in range(6) for c in range(6)], dim=1)


def test_the_image_holds_what_the_answer_says():
    drawn = glyphs.batch(50, seed=3)
    scenes = 0.3 + 0.7 * glyphs.GLYPHS[:, None, None] * 1.0
    templates = scenes * glyphs.COLOURS[None, :, :, None, None]  # (8, 6, 3, 4, 4)
    every = patches(drawn)
    for b in range(50):
        asked = every[b, drawn.asked[b]]
        distance = (templates - asked).square().flatten(2).sum(-1)  # (8, 6)
        key, colour = divmod(int(distance.argmin()), 6)
        assert drawn.input_ids[b, -1] == glyphs.KEY_ID + key
        assert drawn.answers[b] == glyphs.COLOUR_ID + colour == glyphs.COLOUR_ID + drawn.scene[b, key]


def test_only_object_patches_are_brighter_than_noise():
    drawn = glyphs.batch(200, seed=4)
    bright = patches(drawn).mean((2, 3, 4))
    is_object = torch.zeros(200, 36, dtype=torch.bool).scatter(1, drawn.objects, True)
    assert is_object.sum(-1).tolist() == [4] * 200
    assert drawn.objects.equal(drawn.objects.sort(-1).values)
    assert bright[is_object].min() > 0.05 > 0.02 > bright[~is_object].mean().abs()
    assert abs(float(patches(drawn)[~is_object].std()) - glyphs.NOISE) < 0.005


def test_keys_are_distinct_and_the_scene_lists_four():
    drawn = glyphs.batch(100, seed=5)
    assert (drawn.scene < 6).sum(-1).tolist() == [4] * 100
    assert len(glyphs.GLYPHS.flatten(1).unique(dim=0)) == glyphs.KEYS


def test_band_fills_two_neighbouring_rows_and_scattered_does_not():
    rows = glyphs.batch(300, seed=6, layout="band").objects // 6
    assert int((rows.amax(-1) - rows.amin(-1)).max()) == 1
    assert sorted(rows.flatten().unique().tolist()) == list(range(6))
    spread = glyphs.batch(300, seed=6).objects // 6
    assert (spread.amax(-1) - spread.amin(-1)).float().mean() > 2


def test_batches_are_a_function_of_the_seed_alone():
    first = glyphs.batch(5, seed=7)
    torch.manual_seed(99)
    for a, b in zip(first, glyphs.batch(5, seed=7), strict=True):
        assert a.equal(b)
    assert not first.pixel_values.equal(glyphs.batch(5, seed=8).pixel_values)


def test_the_model_has_the_shapes_that_the_text_promises():
    model, drawn = glyphs.build(0), glyphs.batch(3, seed=1)
    with torch.no_grad():
        out = model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values)
    assert out.logits.shape == (3, 38, glyphs.VOCABULARY)
    assert out.image_outputs.pooler_output[0].shape == (36, 64)
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.num_hidden_layers, text.num_hidden_layers) == (6, 4)
    assert (text.num_attention_heads, text.num_key_value_heads) == (4, 2)
    generated = model.generate(
        input_ids=drawn.input_ids, pixel_values=drawn.pixel_values, max_new_tokens=1, do_sample=False
    )
    assert generated[:, -1].equal(out.logits[:, -1].argmax(-1))


def test_training_lowers_the_loss_reaches_the_cls_token_and_is_reproducible():
    losses: list[float] = []
    state = torch.get_rng_state()
    model = glyphs.train(0, progress=lambda step, loss: losses.append(loss), steps=15)
    assert torch.get_rng_state().equal(state)
    assert not model.training and len(losses) == 15
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.5
    untrained = glyphs.build(0).state_dict()
    name = "model.vision_tower.embeddings.class_embedding"
    assert not model.state_dict()[name].equal(untrained[name])
    again, other = glyphs.train(0, steps=2).state_dict(), glyphs.train(0, steps=2).state_dict()
    assert all(again[key].equal(other[key]) for key in again)


def test_trained_weights_are_kept_and_read_back(monkeypatch, tmp_path):
    monkeypatch.setenv("SEQWISE_CACHE", str(tmp_path / "new"))
    whole, steps = glyphs.train, []
    monkeypatch.setattr(glyphs, "train", lambda seed, progress: whole(seed, progress, steps=2))
    first = glyphs.trained(3, progress=lambda step, loss: steps.append(step))
    assert steps == [1, 2]
    (kept,) = (tmp_path / "new").iterdir()
    assert kept.name.startswith("glyphs-") and kept.name.endswith("-3.safetensors")
    monkeypatch.setattr(glyphs, "train", None)
    again = glyphs.trained(3, progress=lambda step, loss: steps.append(step))
    assert steps == [1, 2] and not again.training
    weights, read = first.state_dict(), again.state_dict()
    assert weights.keys() == read.keys() and all(weights[name].equal(read[name]) for name in weights)


def test_a_cache_that_cannot_be_written_costs_a_warning_only(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEQWISE_CACHE", str(tmp_path / "file"))
    model = glyphs.build(0)
    monkeypatch.setattr(glyphs, "train", lambda seed, progress: model)
    assert glyphs.trained(0) is model
    assert "cannot keep the trained model in" in capsys.readouterr().err


def test_accuracy_counts_the_last_position():
    model, drawn = glyphs.build(0), glyphs.batch(8, seed=2)
    with torch.no_grad():
        told = model(input_ids=drawn.input_ids, pixel_values=drawn.pixel_values).logits[:, -1].argmax(-1)
    wrong = torch.where(torch.arange(8) < 2, told + 1, told)
    assert glyphs.accuracy(model, drawn._replace(answers=wrong)) == 0.75


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: glyphs.batch(0, 1), "n must be >= 1, got 0"),
        (lambda: glyphs.batch(1, 1, "rows"), "layout must be 'scattered' or 'band', got 'rows'"),  # type: ignore[arg-type]
        (lambda: glyphs.train(0, steps=0), "steps must be >= 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
