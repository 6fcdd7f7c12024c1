"""Token activation map: where in the images, and in the text before it, a vision-language model sees a token it says.

    F[i, v] = H_i . W_v              H: last hidden states after the final norm, W: rows of the output head
    M_n     = relu F[I, c_n]         the image's rows I, c_n the id of text token n: its raw map
    t_nj    = relu F[r_j, c_n]       earlier text tokens; r_j is a prompt token's own row, the predicting row of an
                                     answer token
    I_n     = sum_J w_j M_j,  w_j = t_nj / (sum_J t + 1e-8),  J = {j < n: another word than n}
    M'_n    = relu(M_n - s I_n),  s = <M_n, I_n> / <I_n, I_n>
    concat(M'_n, t_n) is scaled to [0, 1] as one, and the image part goes through the rank Gaussian filter: in each
    k x k window, sorted z:  sum_a g(a) z / sum_a g(a),  g(a) = exp(-a^2 / 2 sigma^2),  sigma = std z / mean z

Removing the interference I of earlier words is the large effect; the step takes any maps. The filter is the median
where a window is even and nears the mean where it is noisy. Only a forward pass is needed, no gradients, no attention.
"Token Activation Map to Visually Explain Multimodal LLMs", arXiv 2506.23270. Ours: the first answer token is explained
as itself (the official code explains the last input token in its place, `official_first_token`), words are compared by
the text of their ids, an even window gives its value, and prompt text is what stands behind the first visual token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqwise.core import hf
from seqwise.core.anatomy import Anatomy
from seqwise.core.attribution import Attribution, Span, token_texts
from seqwise.core.config import param
from seqwise.core.errors import PromptError, UnsupportedModel, UsageError
from seqwise.core.method import Method
from seqwise.core.segments import Segments
from seqwise.core.views import Stage
from seqwise.insight.explain.base import Explainer, reading


def activations(H: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    """F, before relu: hidden states H (..., n, D) and head rows W (m, D), bias (m,) -> (..., n, m), fp32."""
    F = H.float() @ W.float().mT
    return F if bias is None else F + bias.float()


def interference(maps: Tensor, t: Tensor, same: Tensor) -> Tensor:
    """I: what earlier other words explain of each token's map, (K, N); 0 where there are none.

    maps: (K, N) raw maps in the order of the tokens. t: (K, K), entry n, j how much token j activates the class of n.
    same: bool (K, K), tokens with the same text.
    """
    J = torch.ones_like(t, dtype=torch.bool).tril(-1) & ~same
    w = t.masked_fill(~J, 0.0)
    return (w / (w.sum(-1, keepdim=True) + 1e-8)) @ maps


def subtract(maps: Tensor, interfering: Tensor) -> Tensor:
    """M' = relu(M - s I) with the s that leaves least: (..., N) each; M where I is 0."""
    square = interfering.square().sum(-1, keepdim=True)
    s = (maps * interfering).sum(-1, keepdim=True) / square.clamp(min=torch.finfo(maps.dtype).tiny)
    return torch.where(square > 0, (maps - s * interfering).relu(), maps)


def estimated_causal_inference(maps: Tensor, t: Tensor, texts: Sequence[str]) -> Tensor:
    """Maps (K, N) of K tokens without what earlier words explain; any maps that are not negative.

    t: (K, K) as in `interference`; texts: of the K tokens.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    words = torch.tensor([number[text] for text in texts], device=maps.device)
    return subtract(maps, interference(maps, t, words[:, None] == words))


def joint_normalise(maps: Tensor, t: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (K, N) and the text scores t (K, m) beside them, min-max scaled to [0, 1] as one per token.

    shown: bool (K, m), which text scores count; the others become NaN. All 0 where everything is equal.
    """
    low = torch.minimum(maps.amin(-1), t.masked_fill(~shown, torch.inf).amin(-1))[:, None]
    high = torch.maximum(maps.amax(-1), t.masked_fill(~shown, -torch.inf).amax(-1))[:, None]
    span = high - low
    span = torch.where(span > 0, span, 1.0)
    return (maps - low) / span, ((t - low) / span).masked_fill(~shown, torch.nan)


def rank_gaussian_filter(x: Tensor, k: int = 3) -> Tensor:
    """Rank Gaussian filter of maps (..., h, w), window k x k, k odd; edges are reflected without being repeated.

    0 where a window's mean is not positive. Maps too small to be reflected repeat their edge.
    """
    h, w = x.shape[-2:]
    mode = "reflect" if min(h, w) > k // 2 else "replicate"
    padded = nn.functional.pad(x.reshape(-1, 1, h, w), (k // 2,) * 4, mode=mode)
    z = padded.unfold(-2, k, 1).unfold(-2, k, 1).reshape(-1, h, w, k * k).sort(-1).values
    mu = z.mean(-1, keepdim=True)
    sigma = (z.std(-1, keepdim=True, correction=0) / mu.clamp(min=torch.finfo(x.dtype).tiny)).clamp(min=1e-6)
    a = torch.arange(k * k, device=x.device) - k * k // 2
    g = (-a.square() / (2 * sigma.square())).exp()  # a = 0 has 1: for sigma -> 0 the median is left
    out = (g * z).sum(-1) / g.sum(-1)
    return torch.where(mu[..., 0] > 0, out, 0.0).view(x.shape)


def as_uint8(x: Tensor) -> Tensor:
    """floor(255 x) of values in [0, 1], any shape: what the paper evaluates."""
    return (255 * x).floor().to(torch.uint8)


def otsu(x: Tensor) -> Tensor:
    """Otsu's threshold of uint8 maps (..., h, w) -> (...,): the value t that separates x <= t from x > t best."""
    flat = x.flatten(-2).long()
    count = torch.zeros(*flat.shape[:-1], 256, dtype=torch.float64, device=x.device)
    count = count.scatter_add(-1, flat, torch.ones_like(flat, dtype=torch.float64))
    value = torch.arange(256, dtype=torch.float64, device=x.device)
    below, mass = count.cumsum(-1), (count * value).cumsum(-1)
    above = below[..., -1:] - below
    gap = mass / below.clamp(min=1) - (mass[..., -1:] - mass) / above.clamp(min=1)
    return (below * above * gap.square()).argmax(-1)


def object_iou(x: Tensor, mask: Tensor) -> Tensor:
    """Obj-IoU of uint8 maps with masks, (..., h, w) each, bool: the map is cut at its Otsu threshold. (...,)."""
    found = x > otsu(x)[..., None, None]
    both, either = (found & mask).sum((-2, -1)), (found | mask).sum((-2, -1))
    return both / either.clamp(min=1)


def function_iou(x: Tensor, threshold: Tensor | float) -> Tensor:
    """Func-IoU of a function word's uint8 map (..., h, w): share of pixels below the nouns' mean threshold, (...,)."""
    below = x < torch.as_tensor(threshold, device=x.device)[..., None, None]
    return below.double().mean((-2, -1))


def f1_iou(obj: Tensor, func: Tensor) -> Tensor:
    """F1-IoU: harmonic mean of Obj-IoU and Func-IoU, any shape; 0 where both are."""
    return 2 * obj * func / (obj + func).clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class TokenActivationMap(Explainer):
    """Explains each token that a vision-language model says, by maps over its images and scores of the earlier text.

    Works on any model whose language model ends in a norm and a linear head, with several images, tiles or frames.
    """

    kernel: int = param(3, ge=1, le=15, doc="side of the filter's window, odd; 1 filters nothing")
    max_new_tokens: int = param(32, ge=1, doc="length of the greedy answer that is explained without a target")
    prompt_tokens: bool = False  # explain the prompt's text tokens, too, before the answer's
    official_first_token: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise ValueError(f"TokenActivationMap.kernel must be odd, got {self.kernel} (side of the filter's window)")

    def explain(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        target: Sequence[int] | Tensor | None = None,
        frozen: Tensor | None = None,
        tokenizer: Any = None,
    ) -> Attribution:
        """Scores of image cells and text tokens for each token of the answer.

        inputs: a processor's batch of one prompt (input_ids (1, n), attention_mask, pixel_values, ...), padding
        allowed. target: T ids of an answer, read as if the model had said them; None for its own greedy answer.
        frozen: bool (1, n) or (n,), prompt tokens that are neither scored nor taken for earlier words (chat
        template); special tokens of the tokenizer and text before the first visual token never are.

        Inputs of the result are the prompt's and the answer's tokens but for padding and visual tokens that show no
        cell (line ends of an image); details["positions"] tells where in the unpadded prompt each one stands. Each
        image, tile or frame is one span with its grid. Scores are in [0, 1], NaN for what is not scored.
        details["empty"]: targets whose raw map is zero everywhere, since their logits at the image are negative.
        Raises UnsupportedModel without a vision tower or with an unknown logit transform, PromptError for several
        prompts, one without visual tokens or a frozen of another length, UsageError for bad targets.
        """
        anatomy = Anatomy.of(model)
        anatomy.require({"vision tower"}, type(self).__name__)
        batch, fixed = _unpadded(inputs, frozen)
        n = batch["input_ids"].shape[1]
        with reading(model):
            answer = self._answer(model, batch, target)  # (A,)
            batch = _continued(batch, answer)
            ids = batch["input_ids"][0]
            H, own, segments = _read(model, anatomy, batch)
            visual = segments.visual[0, :n]
            if not visual.any():
                raise PromptError("inputs must hold visual tokens, got a prompt without any")
            special = torch.tensor(sorted(set() if tokenizer is None else tokenizer.all_special_ids), dtype=torch.long)
            behind = visual.long().cumsum(0) > 0  # text in front of the images is the template's
            words = behind & ~visual & ~fixed & ~torch.isin(ids[:n], special.to(ids.device))
            at = words.nonzero()[:, 0]  # (P,)
            P, A = len(at), len(answer)
            text = torch.cat([at, torch.arange(n, n + A, device=ids.device)])  # (K,) the text tokens
            rows = torch.cat([at, torch.arange(n - 1, n + A - 1, device=ids.device)])  # (K,) r: where each is read
            c = ids[text].clone()
            if self.official_first_token:
                c[P] = ids[n - 1]
            cells = visual.nonzero()[:, 0]  # (N,)
            last = torch.tensor([len(ids) - 1], device=ids.device)
            F = _logits(model, H[torch.cat([cells, rows, last])], c, own)[:-1]  # (N + K, K)
        raw, t = F[: len(cells)].relu().T.cpu(), F[len(cells) :].relu().T.cpu()  # (K, N), (K, K)
        strings = [_string(tokenizer, token) for token in ids[text].tolist()]
        maps = estimated_causal_inference(raw, t, strings)
        shown = torch.ones_like(t, dtype=torch.bool).tril(-1)
        shown[:P, :P] = True  # the prompt is read at once: its tokens meet the later ones' scores, too
        maps, scores = joint_normalise(maps, t, shown)
        places = _places(segments, cells)
        for index, grid in places:
            if grid is not None:
                maps[:, index] = rank_gaussian_filter(maps[:, index].unflatten(-1, grid), self.kernel).flatten(-2)
        first = 0 if self.prompt_tokens else P
        full = torch.full((P + A - first, n + A), torch.nan)
        full[:, text.cpu()] = scores[first:]
        full[:, cells.cpu()] = maps[first:]
        return self._result(full, ids, n, text[first:], raw[first:], segments, places, cells, tokenizer)

    def _answer(self, model: Any, batch: Mapping[str, Tensor], target: Sequence[int] | Tensor | None) -> Tensor:
        ids = batch["input_ids"]
        if target is not None:
            answer = torch.as_tensor(target).reshape(-1).to(ids)
            vocabulary = hf.text_config(model).vocab_size
            if not len(answer) or answer.min() < 0 or answer.max() >= vocabulary:
                raise UsageError(f"target must be ids in [0, {vocabulary}), at least one, got {answer.tolist()}")
            return answer
        out = model.generate(**batch, do_sample=False, max_new_tokens=self.max_new_tokens)[0, ids.shape[1] :]
        ends = model.generation_config.eos_token_id
        ended = torch.isin(out, torch.tensor([] if ends is None else ends, dtype=torch.long, device=out.device))
        said = out[: int(ended.nonzero()[0])] if ended.any() else out
        return said if len(said) else out[:1]  # an answer that is only its end is explained as such

    def _result(
        self,
        full: Tensor,
        ids: Tensor,
        n: int,
        explained: Tensor,
        raw: Tensor,
        segments: Segments,
        places: Sequence[tuple[Tensor, tuple[int, int] | None]],
        cells: Tensor,
        tokenizer: Any,
    ) -> Attribution:
        """full: (T, n + A) scores of all tokens. explained: (T,) where the targets stand."""
        texts = token_texts(tokenizer, ids.tolist())
        placed = torch.ones(len(ids), dtype=torch.bool)
        placed[cells.cpu()] = False
        for index, _ in places:
            placed[cells[index].cpu()] = True
        placed[-1] = False  # the last token is no input of any target
        kept = placed.nonzero()[:, 0].tolist()
        new = {position: i for i, position in enumerate(kept)}
        image, tile = segments.image[0].tolist(), segments.tile[0].tolist()
        several = {number: len({tile[p] for p in cells.tolist() if image[p] == number}) > 1 for number in set(image)}
        spans = []
        for index, grid in places:
            first = int(cells[index[0]])
            name = f"image {image[first]}" + (f", tile {tile[first]}" if several[image[first]] else "")
            spans.append(Span(name, new[first], new[first] + len(index), grid))
        special = set() if tokenizer is None else set(tokenizer.all_special_ids)
        visual = set(cells.tolist())
        spans += [Span("special", new[p], new[p] + 1) for p in kept if int(ids[p]) in special and p not in visual]
        where = explained.tolist()
        return Attribution(
            scores=full[:, kept],
            inputs=["" if p in visual else texts[p] for p in kept],
            targets=[texts[p] for p in where],
            method=str(self),
            input_ids=[int(ids[p]) for p in kept],
            target_ids=[int(ids[p]) for p in where],
            spans=spans,
            seen=[sum(p < max(n, position) for p in kept) for position in where],
            details={"positions": kept, "empty": (raw.amax(-1) <= 0).nonzero()[:, 0].tolist()},
        )


@dataclass(frozen=True)
class _Facts(Method):
    """Keeps every token; a run of it knows what the visual tokens of a prompt show."""

    abstract: ClassVar[bool] = True
    slots: ClassVar[tuple[str, ...]] = ("input.rows",)

    def cut_input(self, stage: Stage) -> Tensor:
        return stage.live


def _unpadded(inputs: Mapping[str, Tensor], frozen: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """The batch without padding, and which of its tokens are frozen, bool (n,)."""
    ids = inputs["input_ids"]
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise PromptError(f"inputs must be a batch of one prompt, input_ids (1, n), got {tuple(ids.shape)}")
    mask = inputs.get("attention_mask")
    live = torch.ones_like(ids[0], dtype=torch.bool) if mask is None else mask[0].bool()
    fixed = torch.zeros_like(live) if frozen is None else torch.as_tensor(frozen).reshape(-1).bool().to(live.device)
    if len(fixed) != len(live):
        raise PromptError(f"frozen must have one entry per input id, {len(live)}, got {len(fixed)}")
    if not live.any():
        raise PromptError("inputs must hold at least one token that is not padding, got none")
    per_token = {
        name: value[:, live] for name, value in inputs.items() if name in ("input_ids", "mm_token_type_ids")
    }  # positions and the mask follow from these
    others = {
        name: value
        for name, value in inputs.items()
        if name not in (*per_token, "attention_mask", "position_ids") and isinstance(value, Tensor)
    }
    return {**per_token, "attention_mask": torch.ones_like(per_token["input_ids"]), **others}, fixed[live]


def _continued(batch: Mapping[str, Tensor], answer: Tensor) -> dict[str, Tensor]:
    """The batch with the answer behind the prompt, all text."""
    longer = dict(batch)
    longer["input_ids"] = torch.cat([batch["input_ids"], answer[None]], 1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in batch:
        longer["mm_token_type_ids"] = nn.functional.pad(batch["mm_token_type_ids"], (0, len(answer)))
    return longer


def _read(model: Any, anatomy: Anatomy, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Segments]:
    """Final hidden states (n, D), the model's own logits of the last row (V,), and the tokens' facts."""
    with _Facts().on(model) as run, _hidden_states(anatomy) as caught:
        out = model(**batch, use_cache=False, logits_to_keep=1)
    segments = run.segments
    if segments is None or len(caught) != 1 or caught[0].shape[:2] != batch["input_ids"].shape:
        raise UnsupportedModel(f"{type(model).__name__}: its language model does not show one hidden state per token")
    return caught[0][0], out.logits[0, -1].float(), segments


@contextmanager
def _hidden_states(anatomy: Anatomy) -> Iterator[list[Tensor]]:
    """What the language model returns meanwhile, after its final norm: (1, n, D) per forward."""
    caught: list[Tensor] = []
    hook = anatomy.decoder.register_forward_hook(lambda module, args, output: caught.append(output[0]))
    try:
        yield caught
    finally:
        hook.remove()


def _logits(model: Any, H: Tensor, c: Tensor, own: Tensor) -> Tensor:
    """The model's logits of the ids c (m,) at hidden states H (n, D), fp32 (n, m), from these rows of the head alone.

    own: (V,) what the model itself makes of the last hidden state. Models scale or cap their logits, and some that
    are configured so do not: what agrees is taken. Raises UnsupportedModel where nothing does.
    """
    head, config = model.get_output_embeddings(), hf.text_config(model)
    bias = getattr(head, "bias", None)
    F = activations(H, head.weight[c], None if bias is None else bias[c])
    cap = getattr(config, "final_logit_softcapping", None)
    scaled = F * (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    loose = 1e-3 if head.weight.dtype == torch.float32 else 3e-2  # a head of 16 bits rounds
    for found in (cap * torch.tanh(scaled / cap) if cap else scaled, F):
        error = (found[-1] - own[c].to(found)).abs().max()
        if error <= loose * own.abs().max():
            return found
    raise UnsupportedModel(f"{type(model).__name__}: its logits are not hidden states times the output head")


def _places(segments: Segments, cells: Tensor) -> list[tuple[Tensor, tuple[int, int] | None]]:
    """Per image, tile or frame: which of the visual tokens `cells` (N,) show its cells, in raster order, and its grid.

    None for a grid that is unknown or that the tokens do not fill. Tokens of a known grid without a cell are left out.
    """
    facts = [getattr(segments, name)[0, cells].tolist() for name in ("image", "tile", "row", "column")]
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (image, tile) in enumerate(zip(*facts[:2], strict=True)):
        groups.setdefault((image, tile), []).append(i)
    places: list[tuple[Tensor, tuple[int, int] | None]] = []
    for members in groups.values():
        inside = [i for i in members if facts[2][i] >= 0 and facts[3][i] >= 0]
        grid = None
        if inside:
            grid = max(facts[2][i] for i in inside) + 1, max(facts[3][i] for i in inside) + 1
            raster = [(facts[2][i], facts[3][i]) for i in inside]
            if raster != [(row, column) for row in range(grid[0]) for column in range(grid[1])]:
                grid, inside = None, members
        places.append((torch.tensor(inside or members), grid))
    return places


def _string(tokenizer: Any, token: int) -> str:
    return str(token) if tokenizer is None else str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
