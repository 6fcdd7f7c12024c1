"""Where things are, on one tiny model of each family, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from seqwise.core.anatomy import PARTS, Anatomy
from seqwise.core.errors import UnsupportedModel
from seqwise.testing import FAMILIES

TEXT = ("llama", "qwen3", "mistral", "gemma2", "neox", "gpt2")


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_decoder_layers_and_attention_are_found(name):
    model = FAMILIES[name].tiny()
    anatomy = Anatomy.of(model)
    text = model.config.get_text_config()
    assert len(anatomy.layers) == len(anatomy.attentions) == len(anatomy.windows) == text.num_hidden_layers
    assert all(
        attention in list(layer.modules()) for layer, attention in zip(anatomy.layers, anatomy.attentions, strict=True)
    )
    assert list(anatomy.layers) == next(
        list(child) for child in anatomy.decoder.children() if isinstance(child, nn.ModuleList)
    )
    assert anatomy.heads == text.num_attention_heads
    assert anatomy.kv_heads == getattr(text, "num_key_value_heads", text.num_attention_heads)
    assert anatomy.final_norm is not None and all(mlp is not None for mlp in anatomy.mlps)
    assert (anatomy.vision is not None) == FAMILIES[name].vision


def test_sliding_windows_per_layer():
    assert set(Anatomy.of(FAMILIES["mistral"].tiny()).windows) == {12}
    assert set(Anatomy.of(FAMILIES["gemma2"].tiny()).windows) == {12, None}
    assert set(Anatomy.of(FAMILIES["llama"].tiny()).windows) == {None}


WANTED = {
    "llama": {"RoPE", "1-D positions", "full attention", "pre-norm"},
    "mistral": {"RoPE", "1-D positions", "pre-norm"},
    "gpt2": {"1-D positions", "full attention", "pre-norm"},
    "neox": {"RoPE", "1-D positions", "full attention", "pre-norm"},
    "llava": {"RoPE", "1-D positions", "full attention", "pre-norm", "vision tower", "CLS token"},
    "llava_onevision": {"RoPE", "1-D positions", "full attention", "pre-norm", "vision tower"},
    "qwen25_vl": {"RoPE", "full attention", "pre-norm", "vision tower"},
}


@pytest.mark.parametrize("name", sorted(WANTED))
def test_parts(name):
    anatomy = Anatomy.of(FAMILIES[name].tiny())
    assert anatomy.parts == WANTED[name]
    assert anatomy.mrope == (name == "qwen25_vl")
    anatomy.require(WANTED[name], "Some()")
    for part in sorted(set(PARTS) - WANTED[name]):
        with pytest.raises(UnsupportedModel) as refusal:
            anatomy.require({part}, "Some()")
        assert str(refusal.value) == f"Some() needs {PARTS[part]} ({type(anatomy.model).__name__})"


@pytest.mark.parametrize(
    ("name", "feature", "specials", "prunable"),
    [("llava", 4, 1, True), ("llava_next", 4, 1, True), ("llava_onevision", 5, 0, True), ("qwen25_vl", 1, 0, False)],
)
def test_vision(name, feature, specials, prunable):
    vision = Anatomy.of(FAMILIES[name].tiny()).vision
    assert vision.feature_layer == feature, "the layer whose output the projector reads, counted from 0"
    assert vision.specials == specials and vision.prunable == prunable
    assert len(vision.layers) == len(vision.attentions) > vision.feature_layer
    assert vision.image_token == 97
    if prunable:
        assert vision.grid == (4, 4)
        assert vision.tiled == (name != "llava")


def test_the_feature_layer_is_what_the_projector_really_reads():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(9)
    vision = Anatomy.of(model).vision
    caught = {}
    undo = [
        vision.layers[vision.feature_layer].register_forward_hook(lambda m, a, out: caught.setdefault("layer", out)),
        vision.projector.register_forward_pre_hook(lambda m, args: caught.setdefault("projector", args[0])),
    ]
    with torch.no_grad():
        model(**batch)
    for handle in undo:
        handle.remove()
    layer = caught["layer"][0] if isinstance(caught["layer"], tuple) else caught["layer"]
    assert torch.equal(layer[:, vision.specials :], caught["projector"])


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModel, match=r"is an encoder-decoder; seqwise needs a decoder-only model"):
        Anatomy.of(model)


def test_what_is_no_model_is_refused():
    with pytest.raises(
        UnsupportedModel, match=r"^Linear is not a transformers model; load it with AutoModelForCausalLM$"
    ):
        Anatomy.of(nn.Linear(2, 2))
    empty = nn.Linear(2, 2)
    empty.config = SimpleNamespace()
    with pytest.raises(UnsupportedModel, match=r"^Linear has no list of decoder layers that seqwise knows$"):
        Anatomy.of(empty)


def test_compiled_models_are_refused():
    with pytest.raises(UnsupportedModel, match=r"is compiled; attach to the model before torch\.compile$"):
        Anatomy.of(torch.compile(FAMILIES["llama"].tiny()))


def test_softmax_sinks_and_layers_without_attention_are_refused():
    model = FAMILIES["llama"].tiny()
    model.model.layers[1].self_attn.sinks = nn.Parameter(torch.zeros(4))
    with pytest.raises(UnsupportedModel, match=r"has softmax sinks in its attention, which are not supported$"):
        Anatomy.of(model)
    model = FAMILIES["llama"].tiny()
    model.model.layers[1].self_attn = nn.Identity()
    with pytest.raises(UnsupportedModel, match=r"has no attention module in decoder layer 1; hybrid models"):
        Anatomy.of(model)


def test_layers_that_share_keys_are_refused():
    model = FAMILIES["llama"].tiny()
    model.config.num_kv_shared_layers = 1
    with pytest.raises(UnsupportedModel, match=r"shares keys and values between layers"):
        Anatomy.of(model)


def test_the_fingerprint_is_of_architecture_and_weights():
    one, same = Anatomy.of(FAMILIES["llama"].tiny()), Anatomy.of(FAMILIES["llama"].tiny())
    assert one.fingerprint == same.fingerprint and len(one.fingerprint) == 16
    with torch.no_grad():
        same.model.lm_head.weight[0, 0] += 1
    assert one.fingerprint != same.fingerprint
    assert one.fingerprint != Anatomy.of(FAMILIES["qwen3"].tiny()).fingerprint
