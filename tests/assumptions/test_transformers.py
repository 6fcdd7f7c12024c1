"""What the engine takes for granted about transformers and torch: one test each, named as a sentence."""

import copy
import inspect

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache

from seqwise.core import hf
from seqwise.core.anatomy import Anatomy
from seqwise.testing import FAMILIES

TEXT = [family for family in FAMILIES.values() if not family.vision]
VISION = [family for family in FAMILIES.values() if family.vision]
calls = []  # what the probe below was given


def probe(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    calls.append({"module": module, "query": query, "key": key, "mask": attention_mask, "scaling": scaling, **kwargs})
    out = sdpa(query, key, value, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


@pytest.fixture(autouse=True)
def probed():
    AttentionInterface.register("probe", probe)
    AttentionMaskInterface.register("probe", lambda *args, attention_mask=None, **kwargs: attention_mask)
    calls.clear()


def through_probe(family, **batch):
    model = family.tiny()
    model.set_attn_implementation("probe")
    with torch.no_grad():
        model(**(batch or family.prompt(9)))
    return model


def arguments(module, run):
    """args, kwargs and output of the module's one call inside run()."""
    seen = {}
    before = module.register_forward_pre_hook(lambda m, a, k: seen.update(args=a, kwargs=k), with_kwargs=True)
    after = module.register_forward_hook(lambda m, a, out: seen.update(out=out))
    with torch.no_grad():
        run()
    before.remove()
    after.remove()
    return seen


# attention and masks


@pytest.mark.parametrize("family", TEXT, ids=str)
def test_a_registered_attention_function_gets_all_heads_and_what_the_mask_function_returned(family):
    batch = family.pad_left([family.prompt(9), family.prompt(6)])
    model = through_probe(family, **batch)
    config = model.config
    kv = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert [call["module"].layer_idx for call in calls] == [0, 1, 2, 3]
    for call in calls:
        assert call["query"].shape == (2, 4, 9, 8) and call["key"].shape == (2, kv, 9, 8)
        assert call["mask"].dim() == 2 and torch.equal(call["mask"].bool(), batch["attention_mask"].bool())


def test_softcap_is_given_to_the_attention_function_and_windows_alternate():
    through_probe(FAMILIES["gemma2"])
    assert {call["softcap"] for call in calls} == {50.0}
    assert [call["sliding_window"] for call in calls] == [12, None, 12, None]


def test_without_a_mask_function_of_that_name_padding_would_be_attended():
    AttentionInterface.register("probe without mask", probe)
    family = FAMILIES["llama"]
    model = family.tiny()
    model.set_attn_implementation("probe without mask")
    with torch.no_grad():
        model(**family.pad_left([family.prompt(9), family.prompt(6)]))
    assert all(call["mask"] is None for call in calls)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_each_attention_module_reads_the_implementation_from_its_own_config_attribute(family):
    model = family.tiny()
    rerouted = Anatomy.of(model).attentions[2]
    rerouted.config = copy.copy(rerouted.config)
    rerouted.config._attn_implementation_internal = "probe"
    with torch.no_grad():
        model(**family.prompt(9))
    assert [call["module"] for call in calls] == [rerouted]


# layers


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_the_first_layer_is_given_the_cache_and_layers_return_hidden_states_bare(family):
    model, batch = family.tiny(), family.prompt(9)
    anatomy = Anatomy.of(model)
    found = []

    def look(module, args, kwargs):
        cache = hf.find_cache(args, kwargs)
        found.append((type(cache), cache.get_seq_length()))

    anatomy.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    layer = arguments(anatomy.layers[0], lambda: model(**batch))
    attention = arguments(anatomy.attentions[0], lambda: model(**batch))
    assert found == [(DynamicCache, 0)] * 2
    rows = batch["input_ids"].shape[1]
    assert isinstance(layer["out"], torch.Tensor) and layer["out"].shape == (1, rows, 32)
    assert isinstance(attention["out"], tuple) and attention["out"][0].shape == (1, rows, 32)
    for seen in (layer, attention):
        assert hf.hidden_argument(seen["args"], seen["kwargs"]).shape == (1, rows, 32)


@pytest.mark.parametrize("family", [f for f in FAMILIES.values() if f.name != "gpt2"], ids=str)
def test_rows_can_go_between_layers_if_every_later_layer_is_handed_its_own_positions(family):
    model, batch = family.tiny(), family.prompt(9)
    anatomy, rows = Anatomy.of(model), batch["input_ids"].shape[1]
    keep = torch.arange(rows)[torch.arange(rows) != 4]

    def cut(module, args, kwargs):
        hidden = hf.hidden_argument(args, kwargs)
        if hidden.shape[1] == rows:
            args, kwargs = hf.replace_hidden(args, kwargs, hidden[:, keep])
        kwargs["position_embeddings"] = tuple(x[..., keep, :] for x in kwargs["position_embeddings"])
        return args, {**kwargs, "attention_mask": None}

    for layer in anatomy.layers[2:]:
        layer.register_forward_pre_hook(cut, with_kwargs=True)
    with torch.no_grad():
        out = model(**batch)
    assert out.logits.shape[1] == rows - 1 and out.logits.isfinite().all()
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers][1:3] == [rows, rows - 1]


def test_gpt2_refuses_shorter_rows_behind_its_last_layer():
    family = FAMILIES["gpt2"]
    model = family.tiny()
    model.transformer.h[1].register_forward_pre_hook(lambda m, args: (args[0][:, 1:], *args[1:]))
    with pytest.raises(RuntimeError, match="shape"), torch.no_grad():
        model(**family.prompt(9))


def test_rotary_tables_take_fractional_positions():
    model = FAMILIES["llama"].tiny()
    cos, _ = model.model.rotary_emb(torch.zeros(1), position_ids=torch.tensor([[0.0, 0.25, 1.0]]))
    assert cos[0, 1, 0] == pytest.approx(torch.tensor(0.25).cos().item())


# caches


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_layers_put_into_an_empty_cache_are_the_ones_that_fill(family):
    model, batch, given = family.tiny(), family.prompt(9), []

    def adopt(module, args, kwargs):
        cache = hf.find_cache(args, kwargs)
        if not given:
            given.extend(DynamicCache().layer_class_to_replicate() for _ in range(4))
            hf.adopt_layers(cache, list(given))

    Anatomy.of(model).layers[0].register_forward_pre_hook(adopt, with_kwargs=True)
    out = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    assert isinstance(out.cache, Cache) and [a is b for a, b in zip(out.cache.layers, given, strict=True)] == [True] * 4
    assert given[3].keys.shape[2] == batch["input_ids"].shape[1] + 2


def test_a_second_turn_passes_only_what_the_cache_says_it_has_not_seen():
    family = FAMILIES["llama"]
    model, batch = family.tiny(), family.prompt(9)
    cache = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True).cache
    for layer in cache.layers:  # it may hold less than it has seen
        layer.get_seq_length = lambda: 11
        layer.get_mask_sizes = lambda query_length: (7 + query_length, 0)
        layer.keys, layer.values = layer.keys[:, :, 4:], layer.values[:, :, 4:]
    seen = []
    model.model.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    ids = family.prompt(16, seed=1)["input_ids"]
    model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=1)
    assert torch.equal(seen[0]["input_ids"], ids[:, 11:])
    assert seen[0]["position_ids"].tolist() == [[11, 12, 13, 14, 15]]


def test_beams_reorder_every_cache_layer():
    family = FAMILIES["llama"]
    model, batch, orders = family.tiny(), family.prompt(9), []

    class Layer(DynamicCache().layer_class_to_replicate):
        def reorder_cache(self, beam_idx):
            orders.append(beam_idx)
            super().reorder_cache(beam_idx)

    cache = Cache(layers=[Layer() for _ in range(4)])
    model.generate(**batch, cache=cache, max_new_tokens=4, num_beams=3)
    assert orders and len(orders) % 4 == 0 and {len(order) for order in orders} == {3}


# generate


def test_a_mask_of_ones_does_not_reach_the_model():
    family = FAMILIES["llama"]
    model = family.tiny()
    seen = arguments(model.model, lambda: model.generate(**family.prompt(9), max_new_tokens=1))
    assert seen["kwargs"]["attention_mask"] is None


def test_chunked_prefill_is_several_forwards_over_a_growing_cache():
    family = FAMILIES["llama"]
    model, widths = family.tiny(), []
    model.model.layers[0].register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))
    model.generate(**family.prompt(17), max_new_tokens=3, prefill_chunk_size=7)
    assert widths == [7, 7, 3, 1, 1]


def test_a_decoding_loop_gets_the_model_and_expanded_ids():
    family = FAMILIES["llama"]
    model, seen = family.tiny(), {}

    def loop(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs):
        seen.update(kwargs, criteria=stopping_criteria, ids=input_ids)
        return input_ids

    batch = family.pad_left([family.prompt(9), family.prompt(6)])
    out = model.generate(**batch, max_new_tokens=5, custom_generate=loop, do_sample=True, num_return_sequences=2)
    assert out.shape == seen["ids"].shape == (4, 9)
    assert isinstance(seen["cache"], Cache) and torch.equal(seen["attention_mask"][::2], batch["attention_mask"])
    assert seen["criteria"](torch.zeros(4, 14, dtype=torch.long), None).all()  # the caller's length counts there


def test_generate_reads_the_signature_of_get_image_features_and_calls_the_instances_own():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(9)
    original, times = model.model.get_image_features, []
    assert "pixel_values" in inspect.signature(original).parameters

    def bare(*args, **kwargs):
        times.append(1)
        return original(*args, **kwargs)

    model.model.get_image_features = bare
    with pytest.raises(ValueError, match="pixel_values"):  # encoded already, but not taken out of the arguments
        model.generate(**batch, max_new_tokens=1)
    bare.__wrapped__ = original
    times.clear()
    model.generate(**batch, max_new_tokens=3)
    assert len(times) == 1


# vision


@pytest.mark.parametrize("family", VISION, ids=str)
def test_image_features_come_as_one_tensor_per_image_and_rows_enter_the_language_model_as_embeddings(family):
    model, batch = family.tiny(), family.prompt(12, images=2)
    with torch.no_grad():
        names = inspect.signature(model.model.get_image_features).parameters
        features = model.model.get_image_features(**{n: x for n, x in batch.items() if n in names}).pooler_output
    visual = int((batch["input_ids"] == model.config.image_token_id).sum())
    # Idefics3 and SmolVLM give one tensor per sample
    assert len(features) == (1 if family.pixels == "grouped" else 2)
    assert sum(len(feature) for feature in features) == visual
    seen = arguments(Anatomy.of(model).decoder, lambda: model(**batch))
    assert not seen["args"] and seen["kwargs"].get("input_ids") is None
    assert seen["kwargs"]["inputs_embeds"].shape[1] == batch["input_ids"].shape[1]


@pytest.mark.parametrize("family", VISION, ids=str)
def test_the_language_model_takes_fewer_rows_than_the_prompt_has(family):
    model, batch = family.tiny(), family.prompt(9)
    rows = batch["input_ids"].shape[1]

    def drop(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] == rows:
            positions = kwargs.get("position_ids")
            kwargs |= {"inputs_embeds": kwargs["inputs_embeds"][:, 2:], "attention_mask": None}
            kwargs["position_ids"] = torch.arange(rows - 2)[None] if positions is None else positions[..., 2:]
        else:
            kwargs |= {"attention_mask": None}
        return args, kwargs

    Anatomy.of(model).decoder.register_forward_pre_hook(drop, with_kwargs=True)
    out = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True)
    assert out.sequences.shape[1] == rows + 3
    assert {layer.keys.shape[2] for layer in out.cache.layers} == {rows}  # two less, and two steps


def test_a_llava_tower_runs_on_fewer_patches_and_cuts_the_first_row_as_cls():
    family = FAMILIES["llava"]
    model, batch = family.tiny(), family.prompt(9)
    vision = Anatomy.of(model).vision
    vision.layers[1].register_forward_hook(lambda m, a, out: out[:, :9])  # CLS and 8 of 16 patches
    rows = arguments(vision.projector, lambda: model.model.get_image_features(pixel_values=batch["pixel_values"]))
    assert rows["args"][0].shape == (1, 8, 16)


# torch


def test_the_cpu_kernels_log_sum_exp_includes_scale_and_mask_and_is_zero_on_rows_that_see_nothing():
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 7, 8, generator=random), torch.randn(2, 2, 7, 8, generator=random)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    mask[0, :, :, :3] = False
    added = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, k, 0.0, False, attn_mask=added, scale=0.3)
    expected = (q @ k.repeat_interleave(2, 1).mT * 0.3 + added).logsumexp(-1)
    torch.testing.assert_close(lse[1], expected[1])
    torch.testing.assert_close(lse[0, :, 3:], expected[0, :, 3:])
    assert (lse[0, :, :3] == 0).all()


def test_causal_attention_over_longer_keys_is_aligned_to_the_top_left():
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 5, 8)
    torch.testing.assert_close(sdpa(q, k, k, is_causal=True)[:, :, 0], k[:, :, 0])  # row 0 sees key 0 alone
