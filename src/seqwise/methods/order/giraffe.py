"""Giraffe: rotary frequencies changed so that a model reads further than it was trained to.

    theta_i = base^(-2i/d),  i = 0..d/2-1             angle = position * f_i, attention is unchanged
    linear     f_i = theta_i / s                      s > 1, position interpolation
    power      f_i = theta_i (1 - 2i/d)^kappa         kappa > 0, the slower a frequency the more it is stretched
    truncated  f_i = theta_i  if theta_i >= b,   rho  if a <= theta_i < b,   0  if theta_i < a
               b = 2 pi / T,  a = 2 pi / (8 T),  rho = 2 pi / (16 T)      T: trained length in tokens
    combined   linear, then power, then truncated: a and b compare the frequency as the first two left it
    random     p = cumsum(u), u_t ~ U(0, 2), all times L / p_L where p_L > L      positions, in training only
    xPos       q_m zeta^(m'/S) . k_n zeta^(-n'/S),  zeta_i = (2i + 0.4 d) / (1.4 d)   amplitudes on top of RoPE

A truncated model sees no phase that it has not met in training: slow turns are gone (f = 0 is a dimension without
position), the middle ones are slower still.
"Giraffe: Adventures in Expanding Context Lengths in LLMs", arXiv 2308.10882.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import pi
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqwise.core import hf
from seqwise.core.anatomy import Anatomy
from seqwise.core.errors import AlreadyAttached, UsageError
from seqwise.core.method import Method, param
from seqwise.core.rope import frequencies_of, rotate

# frequency maps


def base_frequencies(d: int, base: float = 10_000.0) -> Tensor:
    """Plain RoPE: theta_i = base^(-2i/d), float32 (d / 2,). Raises ValueError for an odd head dimension d."""
    if d < 2 or d % 2:
        raise ValueError(f"d must be an even number >= 2, got {d} (head dimension)")
    return 1.0 / base ** (torch.arange(0, d, 2).float() / d)


def linear(theta: Tensor, s: float) -> Tensor:
    """Position interpolation: theta / s, (d / 2,). Raises ValueError for s < 1."""
    if not s >= 1:
        raise ValueError(f"s must be >= 1, got {s} (linear scale factor)")
    return theta / s


def power(theta: Tensor, kappa: float) -> Tensor:
    """theta_i (1 - 2i/d)^kappa, (d / 2,). Raises ValueError for kappa < 0."""
    if not kappa >= 0:
        raise ValueError(f"kappa must be >= 0, got {kappa} (exponent of the power scale)")
    i = torch.arange(theta.shape[-1], device=theta.device)
    return theta * (1.0 - i / theta.shape[-1]) ** kappa


def cutoffs(T: int) -> tuple[float, float, float]:
    """(a, b, rho) of the truncated basis for a model trained on T tokens. Raises ValueError for T < 1."""
    if not T >= 1:
        raise ValueError(f"T must be >= 1, got {T} (trained length in tokens)")
    return 2 * pi / (8 * T), 2 * pi / T, 2 * pi / (16 * T)


def truncated(f: Tensor, a: float, b: float, rho: float) -> Tensor:
    """f where f >= b, rho where a <= f < b, 0 below a; (d / 2,)."""
    return torch.where(f >= b, f, torch.where(f >= a, rho, 0.0))


def frequency_map(theta: Tensor, s: float = 1.0, kappa: float = 0.0, T: int | None = None) -> Tensor:
    """All maps in their order: division by s, the power kappa, truncation for T tokens (None: none). (d / 2,)."""
    f = power(linear(theta, s), kappa)
    return f if T is None else truncated(f, *cutoffs(T))


def cos_sin(f: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation tables: f (d / 2,), positions (..., n) -> cosines and sines (..., n, d) float32, the halves alike."""
    angle = positions.float()[..., None] * f.float()  # half precision loses whole positions from 256 on
    angle = torch.cat([angle, angle], -1)  # (..., n, d)
    return angle.cos(), angle.sin()


# random positions


def random_positions(u: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Positions (B, L) float32 from increments u (B, L): their running sum, shrunk to end at L where it goes beyond.

    A sum that ends below L is not stretched. attention_mask: (B, L), 0 at padding, which does not count: a sample's
    L is then the number of its real tokens.
    """
    u = u.float()
    if attention_mask is not None:
        u = u * attention_mask
    p = u.cumsum(-1)  # (B, L)
    limit = torch.full_like(p[:, -1:], u.shape[1])
    if attention_mask is not None:
        limit = attention_mask.sum(-1, keepdim=True).to(p.dtype)
    return p * (limit / torch.maximum(p[:, -1:], limit).clamp(min=1))


def draw_positions(batch: int, length: int, generator: torch.Generator, attention_mask: Tensor | None = None) -> Tensor:
    """Training: random positions (B, L) float32 with increments uniform over [0, 2). The generator is a CPU one."""
    u = 2 * torch.rand(batch, length, generator=generator)
    return random_positions(u, None if attention_mask is None else attention_mask.to(u.device))


def randomise(model: nn.Module, generator: torch.Generator) -> Callable[[], None]:
    """Trains a model on random positions, drawn anew in each forward and shared by all layers; returns the undo.

    Works under any training loop or Trainer: in train mode the decoder's positions are replaced, in eval mode
    (`model.eval()`) they are left alone.

    >>> undo = randomise(model, torch.Generator().manual_seed(0))
    >>> trainer.train()
    >>> undo()

    Raises UnsupportedModel for a model without RoPE or with three position axes. A forward in train mode that
    continues a cache raises UsageError: its tokens were placed by another draw.
    """
    anatomy = Anatomy.of(model)
    anatomy.require({"RoPE", "1-D positions"}, "randomise")

    def place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not module.training:
            return None
        cache = hf.find_cache(args, kwargs)
        if cache is not None and cache.get_seq_length() > 0:
            raise UsageError("random positions cannot continue a cache; call model.eval() before generating")
        embeds = kwargs.get("inputs_embeds")
        tokens = embeds if embeds is not None else kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            return None
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        padding = mask if mask is not None and mask.dim() == 2 else None
        drawn = draw_positions(tokens.shape[0], tokens.shape[1], generator, padding).to(tokens.device)
        kwargs = {**kwargs, "position_ids": drawn}
        if mask is None:  # without one, steps other than 1 are read as packed sequences
            kwargs["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        return args, kwargs

    return anatomy.decoder.register_forward_pre_hook(place, with_kwargs=True).remove


# xPos


def xpos_scale(L: int, d: int, S: float = 512.0) -> Tensor:
    """Amplitudes of queries at positions 0..L-1: zeta_i^(m'/S), float32 (L, d / 2); keys have the reciprocals.

    m' = m - ceil(L / 2): exponents around zero stay representable in half precision. L is the longest sequence.
    """
    zeta = (torch.arange(0, d, 2).float() + 0.4 * d) / (1.4 * d)  # (d / 2,)
    shifted = torch.arange(L) + (-L // 2)
    return zeta ** (shifted / S)[:, None]


def xpos_rotate(x: Tensor, f: Tensor, scale: Tensor, *, interleaved: bool = True) -> Tensor:
    """Rotates x (..., n, d) by the positions 0..n-1 and multiplies by `scale` (n, d / 2): queries or keys of xPos.

    Pairs are (2i, 2i + 1); with `interleaved=False` (i, i + d / 2), as in Llama weights of transformers.
    """
    turned = rotate(x.float(), torch.arange(x.shape[-2], device=x.device), f, interleaved=interleaved)
    both = scale.repeat_interleave(2, -1) if interleaved else torch.cat([scale, scale], -1)  # (n, d)
    return turned * both.to(x.device)


def xpos_scores(q: Tensor, k: Tensor, f: Tensor, scale: Tensor, *, interleaved: bool = True) -> Tensor:
    """Scores (..., n, n) of xPos before causality and the factor 1 / sqrt(d); q and k (..., n, d), scale (n, d / 2)."""
    queries = xpos_rotate(q, f, scale, interleaved=interleaved)
    keys = xpos_rotate(k, f, 1.0 / scale, interleaved=interleaved)
    return queries @ keys.transpose(-1, -2)


# retrieval tasks of any length


def lines(count: int, draw: random.Random) -> tuple[str, str]:
    """The "lines" task: a prompt of `count` numbered lines that hold a value each, asking for one, and its value."""
    names = draw.sample(range(1, 100 * count), count)
    values = [draw.randint(10_000, 99_999) for _ in names]
    asked = draw.randrange(count)
    text = "".join(f"line {name}: the value is {value}\n" for name, value in zip(names, values, strict=True))
    return f"{text}What is the value in line {names[asked]}? The value is", str(values[asked])


def alter_number(answer: str, draw: random.Random) -> str:
    """Another number in place of a numeric answer: a year moves by up to 10, others keep their count of digits.

    Four digits from 1000 to 2099 are taken for a year. Raises ValueError for an answer that is no whole number.
    """
    if not re.fullmatch(r"[0-9]+", answer):
        raise ValueError(f"answer must be a whole number, got {answer!r}")
    if len(answer) == 4 and 1000 <= int(answer) < 2100:
        return str(int(answer) + draw.choice([step for step in range(-10, 11) if step]))
    low = 0 if len(answer) == 1 else 10 ** (len(answer) - 1)
    other = draw.randrange(low, 10 ** len(answer) - 1)
    return str(other + (other >= int(answer)))  # every number but the answer, equally often


def alter_document(document: str, answer: str, altered: str) -> str:
    """The AltQA variant of a document: the number `answer` replaced wherever it stands alone."""
    return re.sub(rf"(?<![0-9]){re.escape(answer)}(?![0-9])", altered, document)


def present(output: str, answer: str) -> bool:
    """Presence accuracy of one output: whether the answer is part of it."""
    return answer in output


@dataclass(frozen=True)
class Giraffe(Method):
    """Changes the rotary frequencies of a model, for longer contexts than it was trained on.

    linear: scale factor s, 1 for none. power: exponent kappa, 0 for none. truncate: the trained length T whose full
    turns bound the truncated basis, None for none. All start from the frequencies that the model has.

    Without training the linear map reaches a little further at lower accuracy. To train under a map, and to keep it
    afterwards, use `apply`; a map may be evaluated at another factor than it was trained with.
    """

    linear: float = param(4.0, ge=1, doc="factor that divides all frequencies")
    power: float = param(0.0, ge=0, doc="exponent of the power scale")
    truncate: int | None = param(None, ge=1, doc="trained length in tokens, whose full turns bound the basis")

    slots: ClassVar[tuple[str, ...]] = ("positions",)

    def identity(self) -> Method:
        return replace(self, linear=1.0, power=0.0, truncate=None)

    def needs(self) -> set[str]:
        return {"RoPE"}

    def check(self, anatomy: Anatomy) -> None:
        frequencies_of(anatomy)

    def frequencies(self, inv_freq: Tensor, anatomy: Anatomy) -> Tensor:
        return frequency_map(inv_freq, self.linear, self.power, self.truncate)

    def apply(self, model: nn.Module) -> Callable[[], None]:
        """Gives the model these frequencies outside of any `with`: to fine-tune it. Returns the undo.

        Checkpoints do not hold frequencies: apply the same map again after loading one.

        >>> undo = Giraffe(linear=4.0).apply(model)
        >>> trainer.train()

        Raises UnsupportedModel for a model without one set of rotary frequencies, AlreadyAttached inside of a `with`.
        """
        if "_seqwise_run" in vars(model):
            raise AlreadyAttached(f"{self}.apply: a method is attached to this model; apply outside of its `with`")
        anatomy = Anatomy.of(model)
        anatomy.require(self.needs(), str(self))
        rotary: Any = frequencies_of(anatomy)
        before = rotary.inv_freq
        rotary.inv_freq = self.frequencies(before.float(), anatomy)

        def undo() -> None:
            rotary.inv_freq = before

        return undo
