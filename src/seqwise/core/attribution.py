"""The one shape of an explanation: how much each input token did for each target token.

    scores[t, i]    what input i did for target t; larger is more, the unit is the explainer's own
    seen[t]         how many inputs target t could see: the prompt and the targets before it
    NaN             not scored: beyond `seen`, padding, or frozen by the caller

Texts come from models and users: what is shown has its markup escaped and its control characters spelled out.
"""

from __future__ import annotations

import html
import json
import math
import os
import tempfile
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqwise.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Group

FORMAT = "seqwise.attribution/1"


@dataclass(frozen=True)
class Span:
    """Inputs start..stop - 1 under one name ("image 0", "question"). grid: rows and columns of an image."""

    name: str
    start: int
    stop: int
    grid: tuple[int, int] | None = None


@dataclass(frozen=True, eq=False)
class Attribution:
    """Scores of n input tokens for T target tokens.

    scores: (T, n), kept as float32 on the CPU. inputs, targets: the tokens' texts, joined they are the text.
    input_ids, target_ids: the tokens' ids where there are any. spans: named ranges of inputs. seen: how many
    inputs each target saw, () for all. method: what made it. details: anything else that JSON can hold.
    Raises UsageError where lengths disagree, a score is infinite, or a span does not fit.
    """

    scores: Tensor
    inputs: Sequence[str]
    targets: Sequence[str]
    method: str = ""
    input_ids: Sequence[int] | None = None
    target_ids: Sequence[int] | None = None
    spans: Sequence[Span] = ()
    seen: Sequence[int] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "scores", torch.as_tensor(self.scores).detach().to("cpu", torch.float32).clone())
        set_(self, "seen", self.seen or [len(self.inputs)] * len(self.targets))
        for name in ("inputs", "targets", "input_ids", "target_ids", "spans", "seen"):
            if getattr(self, name) is not None:
                set_(self, name, tuple(getattr(self, name)))
        T, n = len(self.targets), len(self.inputs)
        if self.scores.shape != (T, n) or not T or not n:
            raise UsageError(
                f"Attribution.scores must be targets x inputs = ({T}, {n}), at least one each, "
                f"got {tuple(self.scores.shape)}"
            )
        if self.scores.isinf().any():
            raise UsageError("Attribution.scores must be finite, or NaN where not scored, got infinity")
        for name, length in (("input_ids", n), ("target_ids", T), ("seen", T)):
            value = getattr(self, name)
            if value is not None and len(value) != length:
                raise UsageError(f"Attribution.{name} must have {length} entries, got {len(value)}")
        if not all(0 <= count <= n for count in self.seen):
            raise UsageError(f"Attribution.seen must be in [0, {n}], got {self.seen}")
        for span in self.spans:
            cells = span.grid is None or span.grid[0] * span.grid[1] == span.stop - span.start
            if not 0 <= span.start < span.stop <= n or not cells:
                raise UsageError(f"Attribution.spans must lie in [0, {n}] and fill their grid, got {span}")

    def top(self, k: int, target: int = 0) -> list[int]:
        """The k scored inputs of largest score for one target, best first; ties: the earlier input."""
        row = self.scores[target]
        order = row.nan_to_num(-math.inf).argsort(descending=True, stable=True)
        return [int(i) for i in order[:k] if not row[i].isnan()]

    def to_words(self) -> Attribution:
        """The same with input tokens joined to words, scores summed; ids are dropped.

        White space and the borders of spans separate words; tokens of a span with a grid stay apart. A word
        without any scored token stays NaN.
        """
        groups = self._words()
        word_of = {i: w for w, group in enumerate(groups) for i in group}
        index = torch.tensor([word_of[i] for i in range(len(self.inputs))])
        shape = len(self.targets), len(groups)
        total = torch.zeros(shape).index_add(1, index, self.scores.nan_to_num(0.0))
        scored = torch.zeros(shape).index_add(1, index, (~self.scores.isnan()).float())
        return replace(
            self,
            scores=total.masked_fill(scored == 0, math.nan),
            inputs=["".join(self.inputs[i] for i in group) for group in groups],
            input_ids=None,
            spans=[replace(s, start=word_of[s.start], stop=word_of[s.stop - 1] + 1) for s in self.spans],
            # a word counts as seen once its first token was
            seen=[word_of[count - 1] + 1 if count else 0 for count in self.seen],
        )

    def _words(self) -> list[list[int]]:
        borders = {edge for span in self.spans for edge in (span.start, span.stop)}
        for span in self.spans:
            if span.grid is not None:
                borders.update(range(span.start, span.stop))
        groups: list[list[int]] = []
        before = ""  # text of the current word so far
        waiting: list[int] = []  # tokens without text, parts of a character that a later token completes
        for i, text in enumerate(self.inputs):
            if not text and i not in borders:
                waiting.append(i)
                continue
            if i in borders and waiting:  # what is left of a broken character stays on its side of the border
                groups = groups or [[]]
                groups[-1] += waiting
                waiting = []
            if i in borders or not groups or text[:1].isspace() or before[-1:].isspace():
                groups.append([])
                before = ""
            groups[-1] += [*waiting, i]
            before += text
            waiting = []
        if not groups:
            return [waiting]
        groups[-1] += waiting
        return groups

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes None."""
        return {
            "format": FORMAT,
            "method": self.method,
            "inputs": list(self.inputs),
            "targets": list(self.targets),
            "scores": [[None if math.isnan(x) else x for x in row] for row in self.scores.tolist()],
            "input_ids": None if self.input_ids is None else list(self.input_ids),
            "target_ids": None if self.target_ids is None else list(self.target_ids),
            "spans": [
                {"name": s.name, "start": s.start, "stop": s.stop, "grid": s.grid and list(s.grid)} for s in self.spans
            ],
            "seen": list(self.seen),
            "details": dict(self.details),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Attribution:
        """Reads what `to_dict` wrote. Raises UsageError that names what is wrong."""
        if not isinstance(document, Mapping) or document.get("format") != FORMAT:
            found = document.get("format") if isinstance(document, Mapping) else type(document).__name__
            raise UsageError(f"an attribution must have format {FORMAT!r}, got {found!r}")
        try:
            return cls(
                scores=torch.tensor([[math.nan if x is None else float(x) for x in row] for row in document["scores"]]),
                inputs=[_text(x) for x in document["inputs"]],
                targets=[_text(x) for x in document["targets"]],
                method=_text(document["method"]),
                input_ids=_ids(document["input_ids"]),
                target_ids=_ids(document["target_ids"]),
                spans=[_span(x) for x in document["spans"]],
                seen=[int(x) for x in document["seen"]],
                details=dict(document["details"]),
            )
        except UsageError:
            raise
        except KeyError as error:
            raise UsageError(f"an attribution must have the field {error}, got {sorted(document)}") from None
        except (TypeError, ValueError, IndexError) as error:
            raise UsageError(f"an attribution has a field that cannot be read: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, atomically. Raises ValueError where `details` holds what JSON cannot."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False, indent=1)
        path = Path(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Attribution:
        """Reads what `save` wrote. Raises UsageError for other files, OSError where there is none."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{path} is no attribution: {error}") from None
        return cls.from_dict(document)

    def to_html(self, title: str = "Attribution") -> str:
        """A whole page without scripts or outside files: per target the inputs, coloured by score."""
        parts = []
        for t, target in enumerate(self.targets):
            best = "; ".join(f"<b>{_escape(self.inputs[i])}</b> {self.scores[t, i]:.3g}" for i in self.top(5, target=t))
            parts.append(
                f"<section><h2>Target: <code>{_escape(target)}</code></h2>"
                f"<p>Largest: {best or 'no input was scored'}</p>\n{self._inputs_html(t)}</section>"
            )
        about = f"<p>{_escape(self.method)}</p>" if self.method else ""
        if self.details:
            rows = "".join(
                f"<tr><th>{_escape(str(name))}</th><td>{_escape(json.dumps(value, default=str))}</td></tr>"
                for name, value in self.details.items()
            )
            about += f"<table>{rows}</table>"
        return _PAGE.format(title=_escape(title), about=about, parts="\n".join(parts))

    def _inputs_html(self, t: int) -> str:
        row, scale = self.scores[t].tolist(), self._scale(t)
        grids = {span.start: (span.stop, span.name, span.grid[1]) for span in self.spans if span.grid}
        out: list[str] = []
        paragraph: list[str] = []

        def close() -> None:
            if paragraph:
                out.append(f"<p class=text>{''.join(paragraph)}</p>")
                paragraph.clear()

        i = 0
        while i < self.seen[t]:
            if i not in grids:
                look = f'style="{_css(row[i], scale)}" title="{_hint(row[i])}"'
                paragraph.append(f"<span {look}>{_escape(self.inputs[i])}</span>")
                i += 1
                continue
            close()
            stop, name, columns = grids[i]
            cells = [f'<td style="{_css(x, scale)}" title="{_hint(x)}"></td>' for x in row[i:stop]]
            lines = ["".join(cells[at : at + columns]) for at in range(0, len(cells), columns)]
            body = "".join(f"<tr>{line}</tr>" for line in lines)
            out.append(f"<table class=grid><caption>{_escape(name)}</caption>{body}</table>")
            i = stop
        close()
        return "".join(out)

    def _scale(self, t: int) -> float:
        return float(self.scores[t].nan_to_num(0.0).abs().max()) or 1.0

    def __rich__(self) -> Group:
        """For the terminal: inputs coloured by score, and the five largest in figures."""
        from rich.console import Group
        from rich.text import Text

        lines = [Text(_visible(self.method), style="dim")] if self.method else []
        for t, target in enumerate(self.targets):
            lines.append(Text.assemble(("target ", "dim"), (_visible(target), "bold")))
            row, scale, shown = self.scores[t].tolist(), self._scale(t), Text()
            for text, score in zip(self.inputs[: self.seen[t]], row, strict=False):
                strength = 0.0 if math.isnan(score) else score / scale
                red, green, blue = _colour(strength)
                style = f"black on rgb({red},{green},{blue})" if abs(strength) >= 0.05 else ""
                shown.append(_visible(text), style=style)
            lines.append(shown)
            best = ", ".join(f"{_visible(self.inputs[i])!r} {row[i]:.3g}" for i in self.top(5, target=t))
            lines.append(Text(f"largest: {best or 'no input was scored'}", style="dim"))
        return Group(*lines)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, so that the texts joined are the decoded whole.

    A token that ends inside a character has the text ""; the one that completes the character has all of it.
    Without a tokenizer (None) the ids themselves, one word each.
    """
    if tokenizer is None:
        return [f"{' ' if i else ''}{token}" for i, token in enumerate(ids)]

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    texts, start, done = [""] * len(ids), 0, 0  # tokens start..done - 1 are the left context of the next ones
    for i in range(len(ids)):
        old, new = decode(ids[start:done]), decode(ids[start : i + 1])
        if new.endswith("\ufffd") and i + 1 < len(ids):
            continue
        texts[i] = new[len(old) :]
        start, done = done, i + 1
    return texts


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _ids(value: Any) -> list[int] | None:
    return None if value is None else [int(x) for x in value]


def _span(value: Any) -> Span:
    grid = None if value["grid"] is None else (int(value["grid"][0]), int(value["grid"][1]))
    return Span(_text(value["name"]), int(value["start"]), int(value["stop"]), grid)


_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _visible(text: str) -> str:
    """Control characters (terminal escapes, reversed writing, lone surrogates) spelled out; not \\n, \\t."""

    def hidden(c: str) -> bool:
        return c in _BIDI or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")

    return "".join(f"\\x{ord(c):02x}" if hidden(c) else c for c in text)


def _escape(text: str) -> str:
    return html.escape(_visible(text))


def _colour(strength: float) -> tuple[int, int, int]:
    """White at 0, orange towards 1, blue towards -1; black text is readable on all of them."""
    s = max(-1.0, min(1.0, strength))
    end = (255, 140, 50) if s >= 0 else (100, 170, 255)
    red, green, blue = (round(255 + abs(s) * (channel - 255)) for channel in end)
    return red, green, blue


def _css(score: float, scale: float) -> str:
    if math.isnan(score):
        return "color:#767676"
    return "background:rgb({},{},{})".format(*_colour(score / scale))


def _hint(score: float) -> str:
    return "not scored" if math.isnan(score) else f"{score:.4g}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
  color: #000; background: #fff }}
h2 {{ font-size: 1em }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere }}
code {{ white-space: pre-wrap }}
.grid {{ border-collapse: collapse; margin: 1em 0 }}
.grid td {{ width: 1em; height: 1em; border: 1px solid #ddd; padding: 0 }}
caption, th {{ text-align: left }}
</style></head><body>
<h1>{title}</h1>
{about}
{parts}
</body></html>
"""
