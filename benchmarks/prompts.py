"""What the benchmarks on a language model share: its start, and real text as ids."""

from __future__ import annotations

import argparse
import warnings

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.lab.zoo import load_model
from seqwise.lab.zoo.text import paragraphs


def start(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 on so many threads, and its tokenizer; no gradients from here on."""
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    quiet()
    return load_model()


def quiet() -> None:
    """What transformers says about progress and settings does not belong into a benchmark's output."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def prose(tokenizer: PreTrainedTokenizerBase, n: int) -> Tensor:
    """The first n tokens (1, n) of the prose that ships with Python.

    Ends the benchmark where there are fewer.
    """
    ids: Tensor = tokenizer("\n\n".join(paragraphs()), return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < n:
        raise SystemExit(f"tokens must be at most {ids.shape[1]} (all the prose there is), got {n}")
    return ids[:, :n]
