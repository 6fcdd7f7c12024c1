"""Image rows on their way into the language model: located, scored, merged, and some of them dropped.

What the vision side found is told image by image, the language model's prompt token by token; placeholders tell which
row goes where. Beams and several returned sequences repeat samples whose images ran once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqwise.core.errors import PromptError
from seqwise.core.ledger import Ledger
from seqwise.core.method import Method
from seqwise.core.segments import Segments, image_runs
from seqwise.core.select import compact
from seqwise.core.towers import Found
from seqwise.core.views import Stage

if TYPE_CHECKING:
    from seqwise.core.engine import Engine


def enter_images(engine: Engine, kwargs: dict[str, Any], ledger: Ledger) -> dict[str, Any]:
    """The decoder's arguments with the rows that go on; writes the ledger and the facts of these rows."""
    assert engine.towers is not None and engine.segments is not None
    B, q = engine.segments.type.shape
    placed = [(found, mask) for kind, found in engine.towers.found.items() if (mask := _places(engine, kind)).any()]
    engine.towers.found = {}  # one prompt uses them
    engine.segments = segments = _located(engine.segments, placed)
    if ledger.whole is not None and ledger.whole.type.shape[1] == q:
        ledger.whole = segments
    rows = ledger.rows[0]
    live = torch.ones(B, q, dtype=torch.bool, device=segments.type.device)
    live = live if rows.live is None else live & rows.live
    embeds: Tensor = kwargs["inputs_embeds"]
    keep, state, member = live, _scores(placed, live), None
    for found, mask in placed:
        if found.keep is not None:
            keep = keep & _spread(mask, found.keep, torch.ones_like(keep))
        if found.features is not None:
            embeds = _spread(mask, found.features.to(embeds.dtype), embeds)
        if found.member is not None:
            member = _members(mask, found.member)
    positions = "compact"
    merged = any(found.features is not None for found, _ in placed)
    reducer = engine.by_slot.get("input.rows")
    ledger.facts["patches"] = _patches(segments, placed)
    if reducer is not None and type(reducer).cut_input is not Method.cut_input and segments.visual.any():
        visual = segments.visual & keep
        image = segments.image.masked_fill(~keep, -1)
        images = torch.arange(ledger.facts["patches"].shape[1], device=image.device)
        stage = Stage(
            layer=0, layers=len(engine.anatomy.layers), order=rows.order.expand(B, -1), live=keep, visual=visual,
            image=image, entered=(image[..., None] == images).sum(1), state=state, patches=ledger.facts["patches"],
            hidden=embeds, _fact=lambda name: getattr(segments, name), scorer=engine.run.scorer,
        )  # fmt: skip
        cut = reducer.cut_input(stage)
        keep = keep if cut is None else keep & cut
        state, positions = stage.state, reducer.input_positions
        if stage.replaced is not None:
            embeds, member = stage.replaced
            merged = True
    keep = keep_last(keep, live, rows.order)
    if merged:
        engine.account.acted = True
        ledger.note_members("input", rows.order.expand(B, -1), keep, member)
    if engine.stages is not None:
        engine.stages.state = state
    if bool((keep == live).all()):
        return kwargs | {"inputs_embeds": embeds}
    return _dropped(engine, kwargs, ledger, embeds, keep, positions)


def keep_last(keep: Tensor, live: Tensor, order: Tensor) -> Tensor:
    """keep (B, r), and each sample's last real row, which foretells the next token, whatever it is."""
    newest = torch.where(live, order, -1).amax(-1, keepdim=True)
    return keep | (live & (order == newest))


def _dropped(
    engine: Engine, kwargs: dict[str, Any], ledger: Ledger, embeds: Tensor, keep: Tensor, places: str
) -> dict[str, Any]:
    assert engine.segments is not None
    index, live = compact(keep)
    kwargs = dict(kwargs)
    kwargs["inputs_embeds"] = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
    kwargs["attention_mask"] = None
    positions = kwargs.get("position_ids")
    rows = ledger.rows[0]
    if engine.anatomy.mrope:
        if positions is not None:
            kwargs["position_ids"] = positions.gather(-1, index.expand(*positions.shape[:-1], -1))
    elif places == "keep":
        kwargs["position_ids"] = rows.order.expand(index.shape[0], -1).gather(1, index).clamp(min=0)
    else:
        # survivors move together: compact positions, and all later ones are lowered by what was dropped
        before = rows.count if rows.live is None else rows.live.sum(-1)
        kwargs["position_ids"] = (live.cumsum(-1) - 1).clamp(min=0)
        ledger.shift[0] = before - live.sum(-1)
    ledger.cut(0, index, live)
    engine.segments = engine.segments.take(index, live)
    if engine.stages is not None:
        engine.stages.state = {name: value.gather(1, index) for name, value in engine.stages.state.items()}
    engine.account.acted = True
    engine.note_kept("input", rows, ledger.rows[0])
    return kwargs


def _places(engine: Engine, kind: str) -> Tensor:
    """(B, q) bool: the rows of images, or of videos."""
    assert engine.segments is not None and engine.towers is not None
    visual = engine.segments.visual
    if len(engine.towers.found) == 1:
        return visual
    vision, ids = engine.anatomy.vision, engine.input_ids
    if ids is None or vision is None:
        raise PromptError("images and videos cannot be told apart in embeddings; give input_ids")
    return visual & (ids == (vision.image_token if kind == "image" else vision.video_token))


def _spread(mask: Tensor, values: Tensor, into: Tensor) -> Tensor:
    """`into` (B, q, ...) with values (rows, ...) at the places of mask (B, q), in order."""
    samples, rows = mask.sum(-1), values.shape[0]
    copies = int(samples.sum()) // rows
    if copies * rows != int(samples.sum()):
        raise PromptError(f"the images have {rows} rows, but the prompt has {int(samples.sum())} placeholders for them")
    if copies > 1:
        parts = values.split(samples[::copies].tolist())
        values = torch.cat([part for part in parts for _ in range(copies)])
    where = mask.view(*mask.shape, *(1,) * (values.dim() - 1)).expand_as(into)
    return into.masked_scatter(where, values.to(into.dtype))


def _located(segments: Segments, placed: list[tuple[Found, Tensor]]) -> Segments:
    """The facts with each visual token's image, tile and grid cell; what was bound by hand stays."""
    if segments.has("tile"):
        return segments
    number = torch.full_like(segments.type, -1)
    facts = {name: getattr(segments, name) for name in ("tile", "row", "column")}
    before = 0
    for found, mask in placed:
        which = torch.arange(len(found.counts), device=number.device).repeat_interleave(
            torch.tensor(found.counts, device=number.device)
        )
        number = _spread(mask, which + before, number)
        before += len(found.counts)
        facts = {name: _spread(mask, getattr(found, name), value) for name, value in facts.items()}
    return replace(segments, image=image_runs(segments.visual, number), **facts)


def _scores(placed: list[tuple[Found, Tensor]], live: Tensor) -> dict[str, Tensor]:
    scores: dict[str, Tensor] = {}
    for found, mask in placed:
        for name, value in found.scores.items():
            into = scores.get(name, torch.zeros(live.shape, dtype=value.dtype, device=live.device))
            scores[name] = _spread(mask, value, into)
    return scores


def _members(mask: Tensor, member: Tensor) -> Tensor:
    """(B, q): the row that each row was merged into, -1 for none; from members (rows,) that count image rows."""
    rows = member.shape[0]
    blank = torch.full(mask.shape, -1, device=mask.device)
    own, target = _spread(mask, torch.arange(rows, device=mask.device), blank), _spread(mask, member, blank)
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    at = torch.full((mask.shape[0], rows + 1), -1, device=mask.device)
    at = at.scatter(1, torch.where(own >= 0, own, rows), columns)
    return torch.where(target >= 0, at.gather(1, target.clamp(min=0)), -1)


def _patches(segments: Segments, placed: list[tuple[Found, Tensor]]) -> Tensor:
    """(B, images): visual tokens of each image's tiles, before the model packed them and anything was dropped."""
    each = torch.zeros_like(segments.type)
    for found, mask in placed:
        count = torch.tensor(found.counts, device=each.device)
        each = _spread(mask, torch.tensor(found.patches, device=each.device).repeat_interleave(count), each)
    images = max(int(segments.image.max()) + 1, 1)
    slot = segments.image.clamp(min=0)
    return torch.zeros(each.shape[0], images, dtype=each.dtype, device=each.device).scatter_reduce(
        1, slot, each.masked_fill(segments.image < 0, 0), "amax"
    )
