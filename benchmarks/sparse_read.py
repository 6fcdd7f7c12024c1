"""Attention of one layer that reads a part of its cache: seconds, keys read, and the attention mass on them.

    python benchmarks/sparse_read.py 2048 8192 32768 --kv-heads 8 --dtype bfloat16

decode: one step after so many cached tokens, through the engine, in blocks of steps that take turns
    keys       query-key products per head and step, those of a search or a vote included
    mass       share of the layer's true attention (softmax over all tokens) on the tokens read, mean over heads
    anew       steps that chose anew (TokenSelect's gate depends on how alike successive queries are)
    speedup    fused attention over all tokens / this; aim: 5 at 32,768 tokens
    TidalDecode is the mean over 32 layers by its schedule; its mass is that of a layer that reuses its own choice.
prefill: a whole prompt at once, few heads of the layer, as heads are alike; HiP against fused causal attention
    exponent   b of the least-squares fit seconds = a tokens^b; aim for HiP: at most 1.2
recall: queries and keys of SmolLM2-135M-Instruct on real prose, the last row; mean over layers and heads
    read       share of the tokens that is read there
    mass       as above; beside it the best set of as many tokens, and the newest tokens with 4 sinks

The first two parts draw their tensors: 7B shape (32 heads of 128), RoPE with base 500,000, keys and queries smooth in
time (AR(1), correlation --rho from token to token), logits with a standard deviation of 3. These heads know nothing of
each other, so that one set for all of them, as TokenSelect has it, holds little of the mass; real heads agree more, as
the last part shows. Before and after anything is timed, what the engine gives must equal attention under a mask of the
tokens that were read, at the positions that the method gives them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from common import arguments, medians, report
from prompts import prose, quiet, start
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from seqwise.core.caches import SlotLayer
from seqwise.core.ledger import Ledger
from seqwise.core.method import Method
from seqwise.core.rope import rotate
from seqwise.core.views import Kernel, Read
from seqwise.methods import Full, HiPAttention, TidalDecode, TokenSelect
from seqwise.methods.cache.hip_attention import hip_attention, key_blocks, rounds
from seqwise.methods.cache.tidal_decode import schedule, scores, select
from seqwise.methods.cache.token_select import fingerprint, reindexed_attention
from seqwise.methods.cache.token_select import select as vote

LAYERS, BASE, STEPS, SPREAD = 32, 500_000.0, 8, 3.0  # steps that are timed at once; deviation of the logits
TYPES = ("float32", "bfloat16")
AIM_SPEEDUP, AIM_TOKENS, AIM_EXPONENT = 5.0, 32_768, 1.2


def smooth(count: int, heads: int, D: int, rho: float, seed: int) -> Tensor:
    """(1, heads, count, D), each token's values correlated with the last ones by rho; unit variance."""
    noise = torch.randn(count, heads, D, generator=torch.Generator().manual_seed(seed))
    for i in range(1, count):
        noise[i] = rho * noise[i - 1] + math.sqrt(1 - rho**2) * noise[i]
    return noise.transpose(0, 1)[None].contiguous()


class Data:
    """Queries of the steps after n tokens, and keys and values of all, (1, heads, ..., D); RoPE done."""

    def __init__(self, n: int, steps: int, options: Any, kv_heads: int) -> None:
        D, dtype = options.head_size, getattr(torch, options.dtype)
        self.n, self.heads, self.kv_heads, self.D = n, options.heads, kv_heads, D
        self.inv_freq = BASE ** -(torch.arange(0, D, 2) / D)
        at = torch.arange(n + steps)
        query = SPREAD * smooth(steps, options.heads, D, options.rho, 0)
        self.query = rotate(query, at[n:], self.inv_freq).to(dtype)
        self.key = rotate(smooth(n + steps, kv_heads, D, options.rho, 1), at, self.inv_freq).to(dtype)
        self.value = torch.randn(1, kv_heads, n + steps, D, generator=torch.Generator().manual_seed(2)).to(dtype)


class Layer:
    """A method's steps on one layer, through the engine of a model that is nothing but its shape."""

    def __init__(self, method: Method, data: Data, index: int) -> None:
        self.method, self.data, self.index, self.taken = method, data, index, 0
        config = LlamaConfig(
            vocab_size=8, hidden_size=data.heads, intermediate_size=8, num_hidden_layers=LAYERS,
            num_attention_heads=data.heads, num_key_value_heads=data.kv_heads, head_dim=data.D,
            rope_parameters={"rope_type": "default", "rope_theta": BASE},
        )  # fmt: skip
        self.engine = method.attach(LlamaForCausalLM(config).eval()).engine
        ledger = Ledger(1, LAYERS, str(method))
        ledger.begin(None, data.n, data.key.device)
        self.cache = SlotLayer(ledger, index)
        self.cache.lazy_initialization(data.key[:, :, :0], data.value[:, :, :0])
        self.cache.keys, self.cache.values = (
            data.key,
            data.value,
        )  # all cases append the same tokens to the same storage
        self.cache.append(data.key[:, :, : data.n], data.value[:, :, : data.n])
        positions = torch.arange(data.n, dtype=torch.float).expand(1, data.kv_heads, -1).clone()
        self.cache.state = {"rope": positions} if method.rotates else {}
        ledger.phase = "decode"
        self.engine.ledger, self.engine.cache = ledger, SimpleNamespace(layers={index: self.cache})
        self.shared: dict[str, Any] = {}

    def step(self) -> Tensor:
        """The next token's attention (1, H, 1, D)."""
        at, data = self.data.n + self.taken, self.data
        row = slice(at, at + 1)
        self.engine.ledger.begin(None, 1, data.key.device)
        self.cache.append(data.key[:, :, row], data.value[:, :, row])
        key, value = self.cache.read()
        self.engine.shared = self.shared
        query = data.query[:, :, self.taken : self.taken + 1]
        self.taken += 1
        return self.engine.attending.attend(
            self.index, query, key, value, 0.0, data.D**-0.5, None, None, torch.tensor([[float(at)]])
        )

    def steps(self) -> None:
        for _ in range(STEPS):
            self.step()

    def products(self) -> float:
        """Per head and step, as the engine counts them."""
        return self.engine.account.pairs / self.data.heads / self.taken

    def read_slots(self) -> tuple[Tensor, Tensor] | None:
        """Slots (1, H, k) that the last step read, and which of them count; None for all."""
        data, last = self.data, self.taken - 1
        if isinstance(self.method, TokenSelect):
            mine = self.cache.ledger.facts.get("token-select", {}).get(self.index)
            if mine is None:
                return None
            near = torch.arange(self.cache.slots - self.method.local, self.cache.slots)[None, None]
            index, live = torch.cat([mine["index"], near], -1), torch.cat([mine["live"], near >= 0], -1)
            return index.expand(-1, data.heads, -1), live.expand(-1, data.heads, -1)
        key, _ = self.cache.read()
        query = data.query[:, :, last : last + 1]
        return self.method.read(Read(self.index, LAYERS, query, key, None, data.D**-0.5, self.shared, self.cache))


def logits(query: Tensor, key: Tensor) -> Tensor:
    """(1, H, n) fp32 of one row per head, (1, H, 1, D) and (1, Hkv, n, D)."""
    groups = query.shape[1] // key.shape[1]
    z = key.float() @ query.float().unflatten(1, (-1, groups)).flatten(2, 3).mT  # (1, Hkv, n, g)
    return (z * query.shape[-1] ** -0.5).mT.flatten(1, 2)


def mass(query: Tensor, key: Tensor, chosen: tuple[Tensor, Tensor] | None) -> float:
    """Share of the full attention of one row per head on the chosen slots, mean over heads."""
    if chosen is None:
        return 1.0
    p = logits(query, key).softmax(-1)
    return float(p.gather(-1, chosen[0]).mul(chosen[1]).sum(-1).mean())


def check(layer: Layer, out: Tensor) -> None:
    """A fast wrong answer is none: the last step's output against attention under a mask of what it read."""
    data, last = layer.data, layer.taken - 1
    key, value = (x.float() for x in layer.cache.read())
    query, chosen = data.query[:, :, last : last + 1].float(), layer.read_slots()
    if isinstance(layer.method, TokenSelect) and chosen is not None:
        turned = [
            rotate(x, -at, data.inv_freq)
            for x, at in ((query, torch.tensor([data.n + last])), (key, torch.arange(key.shape[2])))
        ]
        expected = reindexed_attention(*turned, value, chosen[0][:, :1], chosen[1][:, :1], data.inv_freq)
    else:
        z = logits(query, key)
        if chosen is not None:
            unseen = torch.ones_like(z, dtype=torch.bool)
            for head, own, live in zip(unseen[0], *(x[0] for x in chosen), strict=True):
                head[own[live]] = False
            z = z.masked_fill(unseen, float("-inf"))
        p = z.softmax(-1).unflatten(1, (key.shape[1], -1))  # (1, Hkv, g, n)
        expected = (p @ value).flatten(1, 2)[:, :, None]
    near = {"rtol": 1e-3, "atol": 1e-3} if out.dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(out.float(), expected, **near)


def decode(n: int, kv_heads: int, options: Any) -> list[dict[str, Any]]:
    data = Data(n, STEPS * (options.rounds + 1) + 2, options, kv_heads)
    tidal, hip, voting = TidalDecode(), HiPAttention(), TokenSelect()
    roles = schedule(LAYERS, tidal.start, tidal.correction)
    layers = {
        "full": Layer(Full(), data, 0),
        "choosing": Layer(tidal, data, tidal.correction),
        "TidalDecode": Layer(tidal, data, LAYERS - 1),
        "TokenSelect": Layer(voting, data, 0),
        "TokenSelect, each step": Layer(TokenSelect(reuse=None), data, 0),
        "HiPAttention": Layer(hip, data, LAYERS - 1),
    }

    def one_step() -> None:
        for layer in layers.values():
            if layer is layers["TidalDecode"]:
                layer.shared = dict(layers["choosing"].shared)
            check(layer, layer.step())

    one_step()
    took = medians({name: layer.steps for name, layer in layers.items()}, options.rounds, seconds=math.inf)
    one_step()
    took = {name: seconds / STEPS for name, seconds in took.items()}
    by_role = {"full": "full", "select": "choosing", "reuse": "TidalDecode"}
    keys = {name: layer.products() for name, layer in layers.items()}
    for figures in (took, keys):
        figures["TidalDecode"] = statistics.mean(figures[by_role[role]] for role in roles)
    if n > hip.window + int(hip.budget):  # of a search, which the engine does not see
        blocks = -(-int(hip.budget) // hip.block_k) * hip.block_k
        keys["HiPAttention"] += rounds(n, int(hip.budget), hip.block_k, hip.window) * 2 * blocks / hip.refresh
    rows = []
    for name, layer in layers.items():
        if name == "choosing":
            continue
        chosen = layer.read_slots() if name != "full" else None
        query, (key, _) = data.query[:, :, layer.taken - 1 : layer.taken], layer.cache.read()
        rows.append(
            {
                "part": "decode",
                "case": name,
                "method": str(layer.method),
                "tokens": n,
                "heads": data.heads,
                "KV heads": kv_heads,
                "seconds": took[name],
                "keys": keys[name],
                "mass": mass(query, key, chosen),
                "anew": anew(layer, keys[name]),
                "speedup": took["full"] / took[name],
                "aim": AIM_SPEEDUP if n == AIM_TOKENS and name != "full" else None,
                "checked": True,
            }
        )
    return rows


def anew(layer: Layer, keys: float) -> float | None:
    """Share of the steps in which TokenSelect chose anew, from the products that it counted."""
    method = layer.method
    if not isinstance(method, TokenSelect) or layer.read_slots() is None:
        return None
    kept = method.sinks + int(method.budget) + method.local
    scored = layer.data.n + (layer.taken + 1) / 2 - method.sinks - method.local
    return (keys - kept) / scored


def prefill(dtype: str, options: Any) -> list[dict[str, Any]]:
    method = HiPAttention()
    shape = {"block_q": method.block_q, "block_k": method.block_k, "window": method.window, "stride": method.stride}
    heads, rows = options.prefill_heads, []
    for n in options.prefill:
        data = Data(0, n, SimpleNamespace(**{**vars(options), "heads": heads, "dtype": dtype}), heads)
        q, k, v = data.query, data.key, data.value
        cases = {
            "full": lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, is_causal=True),
            "HiPAttention": lambda q=q, k=k, v=v: hip_attention(
                q, k, v, int(method.budget), sinks=method.sinks, **shape
            ),
        }
        found = check_prefill(q, k, v, cases["HiPAttention"](), method, shape)
        took = medians(cases, options.rounds, seconds=options.seconds)
        for name in cases:
            rows.append(
                {
                    "part": "prefill",
                    "case": name,
                    "method": None if name == "full" else str(method),
                    "dtype": dtype,
                    "tokens": n,
                    "heads": heads,
                    "seconds": took[name],
                    "mass": 1.0 if name == "full" else found,
                    "speedup": took["full"] / took[name],
                    "exponent": None,
                    "aim": None,
                    "checked": True,
                }
            )
    for name in ("full", "HiPAttention"):
        own = [row for row in rows if row["case"] == name]
        if len(own) > 1:
            own[-1]["exponent"] = exponent([row["tokens"] for row in own], [row["seconds"] for row in own])
            own[-1]["aim"] = AIM_EXPONENT if name != "full" else None
    return rows


def exponent(tokens: list[int], seconds: list[float]) -> float:
    """b of the least-squares fit log seconds = log a + b log tokens."""
    x, y = [math.log(n) for n in tokens], [math.log(s) for s in seconds]
    middle, level = statistics.mean(x), statistics.mean(y)
    return sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True)) / sum((a - middle) ** 2 for a in x)


def check_prefill(q: Tensor, k: Tensor, v: Tensor, out: Tensor, method: HiPAttention, shape: dict[str, Any]) -> float:
    """Some query blocks against attention under a mask of their sets; the mean attention mass on these."""
    n, b_q = q.shape[2], method.block_q
    found = []
    for block in range(0, -(-n // b_q), max(1, n // b_q // 8)):
        rows = slice(block * b_q, min(n, (block + 1) * b_q))
        own, at = q[:, :, rows], torch.arange(rows.start, rows.stop)[:, None]
        first, count = key_blocks(own, k[:, :, : rows.stop], int(method.budget), **shape)
        token = torch.arange(rows.stop)
        seen = torch.zeros(1, q.shape[1], len(at), rows.stop, dtype=torch.bool)
        for head, blocks, valid in zip(seen[0], first[0, :, 0], count[0, :, 0], strict=True):
            chosen = (blocks[: int(valid), None] + torch.arange(method.block_k)).flatten()
            head[:, chosen[chosen < rows.stop]] = True
        seen = (seen | (token > at - method.window) | (token < method.sinks)) & (token <= at)
        z = own.float() @ k[:, :, : rows.stop].float().mT * q.shape[-1] ** -0.5
        expected = z.masked_fill(~seen, float("-inf")).softmax(-1) @ v[:, :, : rows.stop].float()
        near = {"rtol": 1e-3, "atol": 1e-3} if out.dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(out[:, :, rows].float(), expected, **near)
        found.append(float(z.masked_fill(token > at, float("-inf")).softmax(-1).mul(seen).sum(-1).mean()))
    return statistics.mean(found)


# real queries and keys


class Listening(Full):
    """The plain model; notes the last row's query and the keys of each layer."""

    abstract = True
    slots = ("attention.kernel",)
    heard: list[tuple[Tensor, Tensor]] = []  # noqa: RUF012

    def attend(self, kernel: Kernel) -> Tensor | None:
        self.heard.append((kernel.query[:, :, -1:].clone(), kernel.key.clone()))
        return None


def recall(n: int, options: Any) -> list[dict[str, Any]]:
    model, tokenizer = start(options)
    Listening.heard.clear()
    with Listening().on(model):
        model(prose(tokenizer, n), logits_to_keep=1)
    heard, k = Listening.heard, n // 8
    hip = HiPAttention(budget=k, window=n // 16, sinks=4)
    voting = TokenSelect(budget=k, sinks=4, local=n // 16, block=1)
    tidal = TidalDecode(budget=k)
    inv_freq, at = model.model.rotary_emb.inv_freq, torch.arange(n)
    roles = schedule(len(heard), tidal.start, tidal.correction)
    found: dict[str, list[tuple[float, float]]] = {}

    def note(name: str, query: Tensor, key: Tensor, index: Tensor, live: Tensor) -> None:
        """What a method reads, and beside it the best and the newest tokens, as many for each head."""
        z = logits(query, key)
        count = live.expand_as(index).sum(-1)  # (1, H)
        best = z.argsort(-1, descending=True)
        newest = torch.cat([torch.arange(4), torch.arange(n - 1, 3, -1)]).expand_as(best)
        place = torch.arange(n)
        sets = {name: (index, live.expand_as(index)), f"{name}: best": (best, place < count[..., None])}
        sets[f"{name}: newest"] = newest, place < count[..., None]
        for label, chosen in sets.items():
            share = float(chosen[1].sum(-1).float().mean()) / n
            found.setdefault(label, []).append((share, mass(query, key, chosen)))

    positions = torch.zeros(0)
    for layer, (query, key) in enumerate(heard):
        H = query.shape[1]
        if roles[layer] == "select":
            positions = select(scores(query, key), k)
        elif roles[layer] == "reuse":
            note("TidalDecode", query, key, positions, torch.ones_like(positions, dtype=torch.bool))
        if layer >= hip.dense:
            blocks, _ = key_blocks(query, key, k, block_q=1, block_k=hip.block_k, window=hip.window)
            token = torch.cat(
                [
                    (blocks[:, :, 0, :, None] + torch.arange(hip.block_k)).flatten(-2),
                    at[-hip.window :].expand(1, H, -1),
                    at[:4].expand(1, H, -1),
                ],
                -1,
            )
            seen = torch.zeros(1, H, n, dtype=torch.bool).scatter(-1, token, True)  # each token once
            note("HiPAttention", query, key, at.expand(1, H, -1), seen)
        turned = rotate(query, torch.tensor([1.0 - n]), inv_freq), rotate(key, -at, inv_freq)
        q_bar = fingerprint(turned[0], inv_freq, voting.local)
        index, live = vote(q_bar, turned[1], [k], sinks=4, local=voting.local)
        note("TokenSelect", query, key, index.expand(1, H, -1), live)
    methods = {"HiPAttention": hip, "TokenSelect": voting, "TidalDecode": tidal}
    return [
        {
            "part": "recall",
            "case": label,
            "method": str(methods[label.partition(":")[0]]),
            "tokens": n,
            "read": statistics.mean(share for share, _ in each),
            "mass": statistics.mean(own for _, own in each),
            "checked": True,
        }
        for label, each in found.items()
    ]


def main() -> None:
    parser = arguments("Attention of one layer that reads a part of its cache.")
    parser.set_defaults(rounds=5, threads=1)
    parser.add_argument("tokens", type=int, nargs="*", default=[2048, 8192, 32768], help="cached tokens of a step")
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[32, 8], help="KV heads, one part each")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", choices=TYPES, default=TYPES[0], help="of the steps")
    parser.add_argument("--rho", type=float, default=0.999, help="correlation of successive keys, and queries")
    parser.add_argument("--prefill", type=int, nargs="*", default=[8192, 16384, 32768], help="lengths of prompts")
    parser.add_argument("--prefill-heads", type=int, default=2)
    parser.add_argument("--prefill-dtype", choices=TYPES, nargs="+", default=TYPES)
    parser.add_argument("--seconds", type=float, default=10.0, help="after which a prompt's turns end, from the third")
    parser.add_argument("--real", type=int, default=2048, help="tokens of prose in the last part, 0 for none")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    steps = [row for kv_heads in options.kv_heads for n in options.tokens for row in decode(n, kv_heads, options)]
    prompts = [row for dtype in options.prefill_dtype for row in prefill(dtype, options)]
    real = recall(options.real, options) if options.real else []
    if options.json:
        report("sparse read", steps + prompts + real, {}, True)
        return
    share, times = "{:.1%}".format, "{:.1f}".format
    shown: dict[str, Callable[[Any], str]] = {"case": str, "tokens": str}
    first: dict[str, Callable[[Any], str]] = {
        "KV heads": str, **shown, "seconds": lambda s: f"{s * 1000:.2f} ms", "keys": "{:.0f}".format, "mass": share,
        "anew": share, "speedup": times, "aim": times,
    }  # fmt: skip
    second: dict[str, Callable[[Any], str]] = {
        "dtype": str, **shown, "seconds": "{:.3f} s".format, "mass": share, "speedup": times,
        **dict.fromkeys(("exponent", "aim"), "{:.2f}".format),
    }  # fmt: skip
    kind = f"{options.heads} heads of {options.head_size}, {options.dtype}"
    report(f"one step of one layer, {kind}", steps, first, False)
    title = f"one layer's prompt, {options.prefill_heads} heads of {options.head_size}"
    report(title, prompts, second, False)
    if real:
        report("attention mass, real text", real, {**shown, "read": share, "mass": share}, False)


if __name__ == "__main__":
    main()
