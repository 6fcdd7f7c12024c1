"""What the tests of the cache methods share: tiny models, and layer 0's queries and keys, which no eviction changes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from seqwise.testing.families import FAMILIES


def build(layers=1, heads=4, kv_heads=2):
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=256, initializer_range=0.25,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@torch.no_grad()
def first_layer(model, ids):
    """q (H, L, D), k and v (Hkv, L, D) of layer 0 for ids (L,), q and k after RoPE."""
    layer = model.model.layers[0]
    x = layer.input_layernorm(model.model.embed_tokens(ids[None]))
    q, k, v = (
        project(x).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
        for project in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, torch.arange(len(ids))[None]))
    return q[0], k[0], v[0]


@torch.no_grad()
def by_steps(model, ids, prompt, method):
    """A prompt, then single steps, teacher-forced. Yields (run, logits (B, V)) after the prompt and after each step."""
    with method.on(model) as run:
        out = model(input_ids=ids[:, :prompt], use_cache=True)
        run.end_prompt()
        yield run, out.logits[:, -1]
        for column in range(prompt, ids.shape[1]):
            at = torch.full((ids.shape[0], 1), column)
            out = model(input_ids=ids[:, column : column + 1], position_ids=at, cache=run.cache, use_cache=True)
            yield run, out.logits[:, -1]


def generate(model, batch, method=None, new=12, **options):
    """Greedy generation; the logits of each step (new, B, V) and the run."""
    options = {
        "max_new_tokens": new,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    } | options
    if method is None:
        return torch.stack(model.generate(**batch, **options).logits), None
    with method.on(model) as run:
        return torch.stack(model.generate(**batch, **options).logits), run


def assert_padded_equals_alone(method, new=12, lengths=(17, 40)):
    """A left-padded batch keeps the same tokens and gives the same logits as each prompt alone."""
    family = FAMILIES["llama"]
    model = family.tiny()
    prompts = [family.prompt(n, seed=i) for i, n in enumerate(lengths)]
    together, run = generate(model, family.pad_left(prompts), method, new)
    assert run.acted
    kept = run.kept()
    for i, prompt in enumerate(prompts):
        alone, run = generate(model, prompt, method, new)
        assert run.kept()[0] == kept[i]
        torch.testing.assert_close(together[:, i], alone[:, 0], **family.tolerance)


@pytest.fixture(scope="session")
def llama():
    return FAMILIES["llama"].tiny()


@pytest.fixture
def tools():
    class Tools:
        pass

    for function in (build, first_layer, by_steps, generate, assert_padded_equals_alone):
        setattr(Tools, function.__name__, staticmethod(function))
    return Tools
