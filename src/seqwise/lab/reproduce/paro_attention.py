"""PAROAttention on maps with known patterns, and on a small video transformer that learns to denoise moving dots.

maps      a head attends along one or two axes of a (8, 16, 16) grid, softly in the others, and noise is added; its
          order and mask come from two maps, what is measured comes from others of the same head
video     8 frames of 16 x 16 pixels with moving discs, tokens of 2 x 2 pixels, (8, 8, 8); the transformer predicts the
          velocity of flow matching at a random noise level, with RoPE of three axes as video models have
plans     calibrated on some videos at four noise levels, measured on others; the baseline keeps the usual order (FHW)
          and has a mask of its own at the same density
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from seqwise.lab.reproduction import Claim, Measured, Progress, Reproduction
from seqwise.methods.attend.paro_attention import (
    ORDERS,
    Calibration,
    PAROAttention,
    PermutationPlan,
    always_kept,
    block_counts,
    block_maxima,
    block_statistics,
    block_sums,
    choose_order,
    dequantise,
    incoherence,
    kept_mass,
    order_tables,
    permute,
    quantise,
    sparsity_score,
    static_mask,
)

DENSITY = 0.25

MAP_GRID = (8, 16, 16)
MAP_BLOCK = 64
WIDE = ("F", "H", "W", "FH", "FW", "HW")  # axes along which a head attends everywhere: one head each
NARROW = 0.7  # how far it sees along the other axes, in tokens
NOISE = 0.5  # of the logits
VALUES = 16  # width of v

GRID = (8, 8, 8)
BLOCK = 16
PATCH = 2
LAYERS, HEADS, WIDTH = 3, 4, 18  # six numbers of a head for the RoPE of each axis
HIDDEN = HEADS * WIDTH
STEPS, BATCH = 350, 4
LEVELS = (0.2, 0.4, 0.6, 0.8)  # noise levels of calibration and measurement
CALIBRATION, TEST = 4, 12  # videos
GAIN = 0.01  # of kept attention, for a head to count as better off in another order

CLAIMS = (
    Claim(
        key="maps-sparsity",
        text="more blocks of a map are empty in its chosen order than in the usual one",
        paper="reordering turns stripes and diagonals into blocks",
        direction=">",
        margin=0.1,
        baseline="share of empty blocks in the order FHW",
    ),
    Claim(
        key="maps-mass",
        text="at a density of 25 % more attention falls on kept blocks",
        paper="lossless metrics at 20-30 % density",
        direction=">",
        margin=0.1,
        baseline="share of attention kept by a mask in the order FHW",
    ),
    Claim(
        key="maps-output",
        text="at a density of 25 % the output is nearer to that of full attention",
        paper="lossless metrics at 20-30 % density",
        direction="<",
        margin=0.1,
        baseline="relative L2 error of the output with a mask in the order FHW",
    ),
    Claim(
        key="maps-rounding",
        text="INT8 codes with one scale per block are nearer to the map in its chosen order",
        paper="blocks without outliers are easier to quantise",
        direction="<",
        margin=0.0,
        baseline="relative L2 error of the rounded map in the order FHW",
    ),
    Claim(
        key="heads-differ",
        text="some heads of a trained video transformer keep at least 1 % more of their attention in another order",
        paper="patterns differ from head to head; a head aggregates along its own axis",
        direction=">",
        margin=0.0,
        baseline="FHW for every head: none (ours: share of heads that gain)",
    ),
    Claim(
        key="trained-mass",
        text="in the trained transformer more attention falls on kept blocks at a density of 25 %",
        paper="lossless metrics at 20-30 % density",
        direction=">",
        margin=0.0,
        baseline="share of attention kept by masks in the order FHW",
    ),
    Claim(
        key="trained-output",
        text="its predictions at a density of 25 % are nearer to those of full attention",
        paper="lossless metrics at 20-30 % density",
        direction="<",
        margin=0.0,
        baseline="relative L2 distance of the predictions with masks in the order FHW",
    ),
    Claim(
        key="lossless",
        text="its denoising error at a density of 25 % is that of full attention",
        paper="nearly identical results to full precision at 20-30 % density",
        direction="<=",
        margin=0.05,
        baseline="error of full attention, as 1",
    ),
    Claim(
        key="int8",
        text="its denoising error with q, k, P and v in INT8 beside that density is that of the sparse one alone",
        paper="nearly identical results with INT8",
        direction="<=",
        margin=0.01,
        baseline="error of the same plan without rounding, over that of full attention",
    ),
    Claim(
        key="videos",
        text="CogVideoX, Wan and Flux keep their metrics",
        paper="lossless metrics at 20-30 % density and INT8/INT4",
        direction=">=",
        margin=0.01,
        baseline="the models with full attention in full precision",
    ),
    Claim(
        key="speed",
        text="generation is faster end to end",
        paper="1.9-2.7 x",
        direction=">",
        margin=1.0,
        baseline="the models with full attention in full precision",
    ),
)


# maps with known patterns


def maps(wide: str, count: int, generator: torch.Generator) -> Tensor:
    """Attention maps (count, N, N) of one head that attends along the axes `wide`."""
    cells = torch.cartesian_prod(*(torch.arange(float(size)) for size in MAP_GRID))  # (N, 3)
    logits = torch.zeros(len(cells), len(cells))
    for axis, name in enumerate("FHW"):
        if name not in wide:
            logits -= ((cells[:, None, axis] - cells[:, axis]) / NARROW) ** 2
    noise = torch.randn(count, *logits.shape, generator=generator)
    return (logits + NOISE * noise).softmax(-1)


@dataclass
class Arm:
    """What one order gives: values that were measured on maps which it has not seen."""

    empty: float
    mass: float
    output: float
    rounding: float


def arm(order: int, seen: Tensor, new: Tensor, v: Tensor) -> Arm:
    """seen, new: maps (., N, N); v: (N, d)."""
    method = PAROAttention(budget=DENSITY, block=MAP_BLOCK)
    index = order_tables(MAP_GRID)[order]
    b, n = method.block, len(index)
    known = torch.stack([block_sums(A[index][:, index], b) for A in seen]).mean(0)
    mask = static_mask(known, method.budget, always_kept(n, 0, b))
    allowed = mask.repeat_interleave(b, 0).repeat_interleave(b, 1)[:n, :n]
    found = []
    for A in new:
        A = A[index][:, index]
        sums = block_sums(A, b)
        sparse = A * allowed
        exact = A @ v[index]
        approximate = (sparse / sparse.sum(-1, keepdim=True)) @ v[index]
        rounded = dequantise(*quantise(A, (b, b)), (b, b))
        found.append(
            (
                float(sparsity_score(sums, method.threshold)),
                float(kept_mass(sums, mask)),
                float((approximate - exact).norm() / exact.norm()),
                float((rounded - A).norm() / A.norm()),
            )
        )
    return Arm(*torch.tensor(found).mean(0).tolist())


def chosen(seen: Tensor) -> int:
    """The order that calibration chooses for one head: maps (., N, N)."""
    method = PAROAttention(block=MAP_BLOCK)
    scores = []
    for index in order_tables(MAP_GRID):
        permuted = [A[index][:, index] for A in seen]
        sums = torch.stack([block_sums(A, method.block) for A in permuted])
        maxima = torch.stack([block_maxima(A, method.block) for A in permuted])
        psi = incoherence(sums, maxima, block_counts(len(index), method.block))
        scores.append((sparsity_score(sums, method.threshold).mean(), psi.mean()))
    sparsity, psi = torch.tensor(scores).unbind(1)
    return int(choose_order(sparsity, psi, method.weight))


# a small video transformer


def videos(count: int, generator: torch.Generator) -> Tensor:
    """Moving discs, as tokens in the order FHW: (count, N, PATCH^2), pixels from -1 to 1."""
    F, rows, columns = GRID
    size = torch.tensor([rows * PATCH, columns * PATCH], dtype=torch.float32)
    pixels = torch.zeros(count, F, rows * PATCH, columns * PATCH)
    y, x = torch.arange(size[0].item()), torch.arange(size[1].item())
    for _ in range(3):  # discs of a video
        start, radius = (
            size * torch.rand(count, 1, 2, generator=generator),
            1.5 + 2 * torch.rand(count, generator=generator),
        )
        velocity = 3 * torch.rand(count, 1, 2, generator=generator) - 1.5
        shade = 0.4 + 0.6 * torch.rand(count, generator=generator)
        centre = start + velocity * torch.arange(float(F))[:, None]  # (count, F, 2)
        centre = size - (centre % (2 * size) - size).abs()  # reflected at the border
        distance = (y[:, None] - centre[..., 0, None, None]) ** 2 + (x - centre[..., 1, None, None]) ** 2
        disc = torch.sigmoid(2 * (radius[:, None, None, None] - distance.sqrt())) * shade[:, None, None, None]
        pixels = torch.maximum(pixels, disc)
    tokens = pixels.view(count, F, rows, PATCH, columns, PATCH).transpose(3, 4)
    return 2 * tokens.reshape(count, F * rows * columns, PATCH * PATCH) - 1


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q, k, v -> out


def full(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v)


class Denoiser(nn.Module):
    """A transformer with full attention over all tokens of a video; `attend` can be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.attend: Attend = full
        self.embed = nn.Linear(PATCH * PATCH, HIDDEN)
        self.level = nn.Sequential(nn.Linear(16, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2 * LAYERS + 1))
        self.qkv = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(HIDDEN, PATCH * PATCH)
        cells = torch.cartesian_prod(*(torch.arange(float(size)) for size in GRID))  # (N, 3)
        pairs = WIDTH // 6  # of numbers per axis
        self.register_buffer("angle", (cells[..., None] * torch.logspace(0, -1, pairs)).flatten(1))  # (N, WIDTH / 2)

    def rotated(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = self.angle.cos(), self.angle.sin()  # type: ignore[operator]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x: (B, N, PATCH^2), t: (B,) in [0, 1] -> the velocity, as x."""
        wave = t[:, None] * 2.0 ** torch.arange(8)  # (B, 8)
        h = self.embed(x) + self.level(torch.cat([wave.sin(), wave.cos()], -1))[:, None]
        for layer in range(LAYERS):
            qkv = self.qkv[layer](self.norms[2 * layer](h)).unflatten(-1, (3, HEADS, WIDTH))
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, HEADS, N, WIDTH)
            found = self.attend(layer, self.rotated(q), self.rotated(k), v)
            h = h + self.out[layer](found.transpose(1, 2).flatten(2))
            h = h + self.mlp[layer](self.norms[2 * layer + 1](h))
        velocity: Tensor = self.head(self.norms[-1](h))
        return velocity


def noisy(clean: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Videos at noise level t (B,), and the velocity from video to noise."""
    noise = torch.randn(clean.shape, generator=generator)
    at = t[:, None, None]
    return (1 - at) * clean + at * noise, noise - clean


def train(seed: int) -> Denoiser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Denoiser().train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / STEPS)
    for _ in range(STEPS):
        t = torch.rand(BATCH, generator=generator)
        x, wanted = noisy(videos(BATCH, generator), t, generator)
        loss = (model(x, t) - wanted).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def plans(model: Denoiser, clean: Tensor, seed: int) -> tuple[PermutationPlan, PermutationPlan]:
    """The calibrated plan, and one in the usual order."""
    method = PAROAttention(budget=DENSITY, block=BLOCK)
    ours, usual = Calibration(method, GRID), Calibration(method, GRID)
    usual.orders = torch.full((LAYERS, HEADS), ORDERS.index("FHW"))

    def show(*calibrations: Calibration) -> None:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for calibration in calibrations:
                calibration.add(layer, q, k)
            return full(layer, q, k, v)

        predictions(model, attend, clean, seed)

    show(ours)
    ours.choose()
    show(ours, usual)
    return ours.plan(), usual.plan()


@torch.no_grad()
def predictions(model: Denoiser, attend: Attend, clean: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Predicted and true velocities of all videos at all LEVELS, (levels, videos, N, PATCH^2)."""
    generator = torch.Generator().manual_seed(seed)
    found, wanted = [], []
    model.attend = attend
    for level in LEVELS:
        t = torch.full((len(clean),), level)
        x, velocity = noisy(clean, t, generator)
        found.append(model(x, t))
        wanted.append(velocity)
    model.attend = full
    return torch.stack(found), torch.stack(wanted)


def under(plan: PermutationPlan, bits: int | None = None) -> Attend:
    return lambda layer, q, k, v: plan.attention(q, k, v, layer, qk_bits=bits, pv_bits=bits)


@torch.no_grad()
def mass(model: Denoiser, plan: PermutationPlan, clean: Tensor, seed: int) -> list[float]:
    """Attention on kept blocks, per layer and head, over all videos and levels."""
    found: list[list[Tensor]] = [[] for _ in range(LAYERS)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_, k_ = (permute(x, plan.tables, plan.orders[layer]) for x in (q, k))
        sums, _ = block_statistics(q_, k_, plan.block)
        found[layer].append(kept_mass(sums, plan.masks[0, layer]).mean(0))  # (HEADS,)
        return full(layer, q, k, v)

    predictions(model, attend, clean, seed)
    return torch.stack([torch.stack(of_layer).mean(0) for of_layer in found]).flatten().tolist()


# what is measured


def measure(seed: int, progress: Progress) -> dict[str, Measured]:
    progress("maps with known patterns")
    generator = torch.Generator().manual_seed(seed)
    ours, usual = [], []
    for wide in WIDE:
        seen, new = maps(wide, 2, generator), maps(wide, 2, generator)
        v = torch.randn(seen.shape[-1], VALUES, generator=generator)
        ours.append(arm(chosen(seen), seen, new, v))
        usual.append(arm(ORDERS.index("FHW"), seen, new, v))
    measured = {
        f"maps-{claim}": Measured([getattr(one, name) for one in ours], [getattr(one, name) for one in usual])
        for claim, name in (("sparsity", "empty"), ("mass", "mass"), ("output", "output"), ("rounding", "rounding"))
    }

    progress("training a video transformer")
    model = train(seed)
    progress("calibrating and measuring")
    drawn = torch.Generator().manual_seed(1000 + seed)
    seen, new = videos(CALIBRATION, drawn), videos(TEST, drawn)
    plan, fhw = plans(model, seen, seed)
    ours_mass, fhw_mass = mass(model, plan, new, seed), mass(model, fhw, new, seed)
    gains = [float(a > b + GAIN) for a, b in zip(ours_mass, fhw_mass, strict=True)]
    exact, wanted = predictions(model, full, new, seed)
    found = {
        name: predictions(model, attend, new, seed)[0]
        for name, attend in (("plan", under(plan)), ("fhw", under(fhw)), ("int8", under(plan, 8)))
    }

    def distance(name: str) -> list[float]:
        return ((found[name] - exact).norm(dim=(-2, -1)) / exact.norm(dim=(-2, -1))).mean(0).tolist()

    def error(prediction: Tensor) -> Tensor:
        return (prediction - wanted).pow(2).mean((0, 2, 3))  # (TEST,)

    relative = {name: (error(prediction) / error(exact)).tolist() for name, prediction in found.items()}
    return measured | {
        "heads-differ": Measured(gains, [0.0] * len(gains)),
        "trained-mass": Measured(ours_mass, fhw_mass),
        "trained-output": Measured(distance("plan"), distance("fhw")),
        "lossless": Measured(relative["plan"], [1.0] * TEST),
        "int8": Measured(relative["int8"], relative["plan"]),
    }


REPRODUCTION = Reproduction(
    slug="paro-attention",
    claims=CLAIMS,
    measure=measure,
    seeds=(0, 1, 2),
    notes=(
        "Drawn maps, and a transformer of 3 layers and 4 heads over 512 tokens with blocks of 16, instead of models with "
        "tens of thousands of tokens and blocks of 64. One mask for all noise levels. INT8 is simulated."
    ),
    not_testable={
        "videos": "needs the models and their benchmarks",
        "speed": "needs block-sparse INT8 kernels on a GPU",
    },
)
