import os

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need a download

torch.set_num_threads(1)  # tensors are tiny; workers share the cores

# HYPOTHESIS_PROFILE=thorough looks for rarer failures, with new examples each time
settings.register_profile("quick", deadline=None, max_examples=25, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(scope="session")
def byte_llama(tmp_path_factory):
    """Saves a random Llama whose tokens are bytes, with its tokenizer; returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def save(**options) -> str:
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("model")
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, "</s>"])}, []))
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(path)
        config = LlamaConfig(
            vocab_size=257, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
            eos_token_id=256, bos_token_id=None, **options,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(path)
        return str(path)

    return save
