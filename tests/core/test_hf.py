"""The one file that knows transformers' private names."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, EncoderDecoderCache, StaticCache

from seqwise.core import hf
from seqwise.core.caches import SlotLayer
from seqwise.core.engine import attend
from seqwise.core.ledger import Ledger
from seqwise.testing import FAMILIES


def llama():
    return FAMILIES["llama"].tiny()


def test_attention_is_registered_once_and_stays():
    hf.register_attention(attend)
    assert AttentionInterface._global_mapping[hf.ATTENTION] is attend
    hf.register_attention(lambda *args: None)
    assert AttentionInterface._global_mapping[hf.ATTENTION] is attend


def test_only_the_routed_modules_see_another_config_and_only_until_undone():
    model, config = llama(), None
    config = model.config
    other = type(model)(config)  # shares the config object
    words = copy.deepcopy(config.to_dict())
    undo = hf.route_attention(list(model.model.modules()))
    routed = {id(module.config) for module in model.model.modules() if hasattr(module, "config")}
    assert len(routed) == 1 and id(config) not in routed
    assert model.model.layers[0].self_attn.config._attn_implementation == hf.ATTENTION
    assert other.config is config and config._attn_implementation == "sdpa" and config.to_dict() == words
    undo()
    assert all(module.config is config for module in model.modules() if hasattr(module, "config"))


def test_modules_without_a_config_are_passed_over():
    hf.route_attention([nn.Linear(2, 2)])()


def test_a_cache_is_found_whatever_its_name():
    cache = DynamicCache()
    assert hf.find_cache((1, None), {"layer_past": cache}) is cache
    assert hf.find_cache((torch.zeros(1), cache), {}) is cache
    assert hf.find_cache((1,), {"x": [cache]}) is None


def test_caches_that_cannot_be_taken_over():
    model = llama()
    assert hf.cache_refusal(DynamicCache()) is None
    assert hf.cache_refusal(DynamicCache(config=model.config)) is None
    assert hf.cache_refusal(StaticCache(model.config, max_cache_len=8)).startswith("static caches are not supported")
    pair = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert hf.cache_refusal(pair) == "encoder-decoder caches are not supported"
    offloaded = DynamicCache()
    offloaded.offloading = True
    assert hf.cache_refusal(offloaded).startswith("offloaded caches are not supported")


def test_layers_are_put_into_the_callers_own_cache():
    cache = DynamicCache(config=llama().config)
    layers = [SlotLayer(Ledger(1, 2, "Some()"), i) for i in range(2)]
    hf.adopt_layers(cache, layers)
    assert cache.layers == layers and cache.get_seq_length() == 0
    assert hf.new_cache(layers).layers == layers


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: (x,)])
def test_outputs_are_tensors_or_tuples(wrap):
    old, new = torch.zeros(1), torch.ones(1)
    assert hf.hidden_of(wrap(old)) is old
    assert hf.hidden_of(hf.with_hidden(wrap(old), new)) is new
    assert isinstance(hf.with_hidden(wrap(old), new), tuple) == isinstance(wrap(old), tuple)


@pytest.mark.parametrize("by_name", [True, False])
def test_hidden_states_come_by_place_or_by_name(by_name):
    old, new = torch.zeros(1), torch.ones(1)
    args, kwargs = ((), {"hidden_states": old, "x": 1}) if by_name else ((old, 2), {"x": 1})
    assert hf.hidden_argument(args, kwargs) is old
    changed = hf.replace_hidden(args, kwargs, new)
    assert hf.hidden_argument(*changed) is new
    assert len(changed[0]) == len(args) and changed[1].keys() == kwargs.keys()
    assert hf.hidden_argument(args, kwargs) is old, "the caller's arguments stay"


def test_tiles_of_a_batch():
    family = FAMILIES["llava_next"]
    owner = family.tiny().model
    sizes = torch.tensor([(16, 32), (28, 20)])  # two and four tiles, and the overview of each
    assert hf.tiles_per_tile(owner, {"image_sizes": sizes}) == [3] * 3 + [5] * 5
    assert hf.tiles_per_tile(owner, {}) == []
    assert hf.tiles_per_tile(FAMILIES["llava"].tiny().model, {"image_sizes": sizes}) == []


def test_single_outputs_become_one_batch():
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def output(value, rows):
        hidden = (torch.full((1, 4, 2), value), torch.full((1, rows, 2), value))
        return BaseModelOutputWithPooling(last_hidden_state=hidden[1], hidden_states=hidden)

    joined = hf.joined_outputs([output(1.0, 3), output(2.0, 3)])
    assert joined.last_hidden_state[:, 0, 0].tolist() == [1, 2] and joined.hidden_states[0].shape == (2, 4, 2)
    ragged = hf.joined_outputs([output(1.0, 3), output(2.0, 2)])
    assert ragged.last_hidden_state is None and ragged.hidden_states[1] is None
    assert ragged.hidden_states[0].shape == (2, 4, 2), "what is of one length stays"


def test_the_language_models_config():
    assert hf.text_config(FAMILIES["llava"].tiny()).model_type == "llama"
    plain = SimpleNamespace(config=SimpleNamespace(model_type="old"))
    assert hf.text_config(plain).model_type == "old"


def test_versions_name_what_results_depend_on():
    assert set(hf.versions()) >= {"torch", "transformers"}
