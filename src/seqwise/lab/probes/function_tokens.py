"""Does the loss of a model sit behind function tokens?

    classes    function tokens: the most frequent ones, up to 40 % of a corpus that is not the measured text
    groups     next-token losses by (class of the current token, class of the next): f->f, f->c, c->f, c->c
    value      of each group its loss per token over that of all tokens, and its shares of tokens and of the loss
    interval   bootstrap over documents, of sums

Without data of your own: prose of the Python documentation; of every five paragraphs four are counted, one is measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seqwise.core.errors import UsageError
from seqwise.insight.probe.function_tokens import FunctionTokens
from seqwise.lab.intervals import LEVEL
from seqwise.lab.probes.base import Probe, Progress, Result, Row, Settings, Verdict
from seqwise.lab.probes.lines import Line, read_lines
from seqwise.lab.rows import PLAIN
from seqwise.lab.zoo.text import fit, paragraphs

ITEMS, LENGTH = 40, 256  # documents; tokens of one, at most
BLOCK = 10  # documents measured at once
GROUPS = ("f->f", "f->c", "c->f", "c->c")
BOOTSTRAP = 2_000
BEHIND = "hardest behind function tokens"
ELSEWHERE = "not hardest behind function tokens"
OPEN = "no difference found at this size"
FORM = '{"text": ...}, with "use": "count" where it is only counted'

Array = npt.NDArray[np.float64]


class FunctionTokensProbe(Probe):
    name: ClassVar[str] = "function-tokens"
    asks: ClassVar[str] = "Is what is hard to predict the content token that follows a function token?"
    reading: ClassVar[str] = (
        "Function tokens are the few most frequent ones (articles, prepositions, punctuation), together 40 % of a "
        "corpus. f->c is a content token behind a function token. Loss per token: 100 % is the mean of all tokens, "
        "which is given in nats. A group can be the hardest per token and still not hold most of the loss: its share "
        "depends on how often it occurs."
    )
    finding: ClassVar[str] = (
        "Function tokens (arXiv 2510.08203): with models of 1.5 and 8 billion parameters trained on SlimPajama, f->c "
        "has the highest loss of the four groups throughout training, and the larger model gains most there; with the "
        "tokenizer of Llama 3.1, 122 tokens are function tokens."
    )

    def facts(self, settings: Settings) -> dict[str, Any]:
        measured, counted = self.texts(settings)
        return {"items": len(measured), "counted": len(counted)}

    def texts(self, settings: Settings) -> tuple[list[str], list[str]]:
        """Texts to measure, and texts to count."""
        prose = paragraphs()
        if settings.task is None:
            held_out = [text for i, text in enumerate(prose) if i % 5 == 4]
            random.Random(f"function tokens {settings.seed}").shuffle(held_out)
            return held_out[: settings.items or ITEMS], [text for i, text in enumerate(prose) if i % 5 != 4]
        own = read_lines(settings.task, _line, FORM)
        measured = [text for counts, text in own if not counts]
        if not measured:
            raise UsageError(f"{settings.task} must have a line to measure, got only lines with the use 'count'")
        return measured[: settings.items or ITEMS], [text for counts, text in own if counts] or list(prose)

    def measure(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, progress: Progress
    ) -> None:
        measured, counted = self.texts(settings)
        blocks = [range(start, min(start + BLOCK, len(measured))) for start in range(0, len(measured), BLOCK)]
        progress.plan(1 + len(blocks))
        probe = FunctionTokens()

        def encoded(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        def count() -> list[int]:
            return probe.function_ids([encoded(text) for text in counted], len(tokenizer))

        function = progress.once("function", "counting tokens", count)
        for block in blocks:

            def losses(block: range = block) -> list[Any]:
                documents = [tokenizer.encode(fit(measured[i], tokenizer, LENGTH)) for i in block]
                found = probe.losses(model, documents, probe.class_ids(function, len(tokenizer)), _special(tokenizer))
                return [
                    {"loss": one.total.flatten().tolist(), "tokens": one.tokens.flatten().tolist()} for one in found
                ]

            said = f"documents {block[0] + 1} to {block[-1] + 1} of {len(measured)}"
            progress.once(f"{block[0]} to {block[-1]}", said, losses)

    def result(self, settings: Settings, records: Mapping[str, Any]) -> Result:
        blocks = [found for key, found in records.items() if key != "function"]
        documents = [one for block in blocks for one in block if sum(one["tokens"])]
        if not documents:
            return Result([], [], [])
        loss, tokens = (np.array([one[name] for one in documents]) for name in ("loss", "tokens"))  # (n, 4)
        notes = [f"{len(records['function'])} token types are function tokens; texts end after {LENGTH} tokens"]
        if settings.remedies:
            notes.append("this probe judges no methods")
        return Result([_verdict(loss, tokens)], _rows(loss, tokens), notes)


def _line(line: Line) -> tuple[bool, str]:
    if line.fields.get("use", "measure") not in ("measure", "count"):
        raise line.fail("use", "'measure' or 'count'")
    return line.fields.get("use") == "count", line.text("text")


def _special(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [int(one) for one in tokenizer.all_special_ids]


# statistics: of sums over documents; loss and tokens are (..., documents, 4) or, resampled, (R, 4)


def _per_token(loss: Array, tokens: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(loss / tokens / (loss.sum(-1, keepdims=True) / tokens.sum(-1, keepdims=True)))


def _loss_share(loss: Array, tokens: Array) -> Array:
    return np.asarray(loss / loss.sum(-1, keepdims=True))


def _token_share(loss: Array, tokens: Array) -> Array:
    return np.asarray(tokens / tokens.sum(-1, keepdims=True))


def _resampled(values: Array) -> Array:
    n = len(values)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP)  # (R, n)
    return np.asarray(weights @ values)


def _bounds(values: Array) -> tuple[float | None, float | None]:
    known = values[np.isfinite(values)]
    if not len(known):
        return None, None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _rows(loss: Array, tokens: Array) -> list[Row]:
    n, rows = len(loss), []
    draws = _resampled(loss), _resampled(tokens)
    kinds: tuple[tuple[str, Callable[[Array, Array], Array]], ...] = (
        ("loss per token, over that of all tokens", _per_token),
        ("share of the loss", _loss_share),
        ("share of the tokens", _token_share),
    )
    for group, statistic in kinds:
        values, resampled = statistic(loss.sum(0), tokens.sum(0)), statistic(*draws)
        for k, what in enumerate(GROUPS):
            if not tokens[:, k].sum():
                why = "no such pair of tokens in the text"
                rows.append(Row(group, PLAIN, what, status="not judged", reason=why))
                continue
            low, high = _bounds(resampled[:, k]) if n > 1 else (None, None)
            note = f"{loss[:, k].sum() / tokens[:, k].sum():.2f} nats" if statistic is _per_token else ""
            rows.append(Row(group, PLAIN, what, float(values[k]), low, high, n, note=note))
    return rows


def _verdict(loss: Array, tokens: Array) -> Verdict:
    """Whether f->c is the hardest group: its loss per token minus the largest of the others'."""
    with np.errstate(invalid="ignore", divide="ignore"):
        nats = loss.sum(0) / tokens.sum(0)
        drawn = _resampled(loss) / _resampled(tokens)  # (R, 4)
    others = [0, 2, 3]
    ahead = drawn[:, 1] - np.nanmax(np.nan_to_num(drawn[:, others], nan=-np.inf), axis=1)
    low, high = _bounds(ahead) if len(loss) > 1 else (None, None)
    word = OPEN if low is None or high is None else BEHIND if low > 0 else ELSEWHERE if high < 0 else OPEN
    shown = ", ".join(f"{name} {value:.2f}" for name, value in zip(GROUPS, nats, strict=True))
    share, most = loss.sum(0) / loss.sum(), int(loss.sum(0).argmax())
    return Verdict(
        "next-token loss",
        PLAIN,
        word,
        f"nats per token: {shown}; most of the loss is in {GROUPS[most]}, {share[most]:.0%}; f->c holds {share[1]:.0%} "
        f"of it at {tokens[:, 1].sum() / tokens.sum():.0%} of the tokens",
    )
