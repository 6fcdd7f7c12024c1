"""Recall batches under a method: a prompt in one forward, then the other tokens one step at a time, teacher-forced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqwise.core.method import Method
from seqwise.core.run import Run


@torch.no_grad()
def stepwise(model: Any, ids: Tensor, prompt: int, method: Method) -> tuple[Run, Tensor]:
    """Runs ids (B, L): the first `prompt` columns as a prompt, the rest as single steps, all under `method`.

    Returns the run, and the logits (B, L - prompt, V) of the steps.
    """
    logits = []
    with method.on(model) as run:
        model(input_ids=ids[:, :prompt], use_cache=True, logits_to_keep=1)
        run.end_prompt()
        for column in range(prompt, ids.shape[1]):
            step = model(
                input_ids=ids[:, column : column + 1],
                position_ids=torch.full((ids.shape[0], 1), column),
                cache=run.cache,
                use_cache=True,
            )
            logits.append(step.logits[:, -1])
    return run, torch.stack(logits, 1)


def hits(logits: Tensor, targets: Tensor) -> list[float]:
    """Per sequence, the share of its steps whose most probable token is the target: (B, Q, V), (B, Q) -> B shares."""
    return (logits.argmax(-1) == targets).double().mean(-1).tolist()
