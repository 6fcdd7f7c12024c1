"""`compare` on a vision-language model: accuracy by type of question, and what each method saves.

Questions are part of the prompt (question-aware): a model reads image and question together. Default data are drawn
scenes; a file of your own has one column per `type`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.core.errors import UsageError
from seqwise.lab.compare import Comparison, Settings
from seqwise.lab.looking import KINDS, Pictured, Pictures, Scenes, data_url
from seqwise.lab.measure import Traced
from seqwise.lab.rows import Cell
from seqwise.lab.tasks import Prompt, Task
from seqwise.lab.zoo import SCENES, load_vlm, sees

_METHODS = (
    "RandomTokens", "UniformGrid", "AveragePool", "FastV", "FoPru", "VTCCLS", "HiPrune", "FlowCut", "ToDRE(tau=0.0)",
    "VMTC",
)  # fmt: skip


def comparison(settings: Settings, *, out: Path | None = None, resume: bool = False) -> Comparison:
    """The comparison that suits the model."""
    kind = SeeingComparison if sees(settings.model, settings.trust_remote_code) else Comparison
    return kind(settings, out=out, resume=resume)


class SeeingComparison(Comparison):
    """A comparison on questions about images."""

    default_model: ClassVar[str] = SCENES
    default_methods: ClassVar[Sequence[str]] = _METHODS
    default_budgets: ClassVar[Sequence[str]] = ("0.5", "0.25", "0.125", "0.0625")
    default_prompts: ClassVar[int] = 30
    quick_methods: ClassVar[Sequence[str]] = ("RandomTokens(budget=0.125)", "FoPru(budget=0.125)")
    quick_prompts: ClassVar[int] = 10

    def _tasks(self) -> dict[str, Task]:
        if not self.settings.tasks:
            return {kind: Scenes(kind) for kind in KINDS}
        tasks: dict[str, Task] = {}
        for text in self.settings.tasks:
            if text.endswith(".jsonl"):
                path = text.removeprefix("file:").removeprefix("pictures:")
                tasks |= {kind or path: Pictures(path, kind) for kind in Pictures(path).types()}
            elif text in (*KINDS, "several", "frames"):
                tasks[text] = Scenes(text)
            else:
                known = ", ".join((*KINDS, "several", "frames"))
                raise UsageError(f"--task for a vision-language model must be {known} or a .jsonl file, got {text!r}")
        return tasks

    def _lengths(self) -> tuple[int, ...]:
        if self.settings.lengths:
            raise UsageError("--length is for language models; questions about images have the length they have")
        return ()

    def _load(self) -> tuple[PreTrainedModel, Any]:
        s = self.settings
        return load_vlm(self.facts["model"], dtype=s.dtype, device=s.device, trust_remote_code=s.trust_remote_code)

    def _prompts(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[Cell, list[Prompt]]:
        assert self.settings.prompts is not None
        n, seed = self.settings.prompts, self.settings.seed
        return {cell: self.tasks[cell.task].prompts(tokenizer, n, seed, 0) for cell in self.cells}

    def _take_sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        cell: Cell,
        prompt: Prompt,
        i: int,
        count: int,
        traced: dict[str, Traced],
    ) -> None:
        """Of each type the first question that is about something in its images: these, and what every method kept."""
        pictures = self.sample.setdefault("pictures", [])
        taken = any(one["task"] == cell.task for one in pictures)
        if taken or not isinstance(prompt, Pictured) or not prompt.facts.get("relevant", True):
            return
        pictures.append(
            {
                **cell._asdict(),
                "question": prompt.question,
                "answer": prompt.answer,
                "images": [data_url(image) for image in prompt.images],
                "methods": {name: {"text": one.measurement.text, "maps": one.pictures} for name, one in traced.items()},
            }
        )
