"""Token Recycling: drafts come from the candidates that earlier steps computed and would have thrown away.

    M (V, K)   M[t] = the K likeliest tokens seen most recently after token t, best first; starts as zeros
    draft      ids[i] = M[ids[father_i], rank_i] at node i of a fixed tree;  ids[0] = the newest token
    verify     one forward over all N nodes; each sees the cache and its ancestors, at position P + depth_i
    accept     g_i = argmax logits_i;  the path of the longest run  ids[p_{j+1}] == g[p_j];  then g of its end
    recycle    M[ids[i]] = top-K of logits_i for every node i, accepted or not

The output is the greedy one, whatever the drafts. M is kept across requests ("hot start"). Sampling: draw one
token at every node from the model's own distribution and walk to the child that holds it.
"Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
arXiv 2408.08696. The update's rule for repeated tokens (the last node wins) and the sampling walk are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from seqwise.core.method import Method, param
from seqwise.core.run import Loop

# The official template "2.2.2": how many children each node has, per depth, in breadth-first order.
CHILDREN = (
    (8,),
    (8, 4, 3, 2, 1, 1, 1, 1),
    (8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0),
    (5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0),
    (3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0),
    (2, 0, 0, 1, 0, 0, 0, 0),
    (0, 0, 0),
)
NODES = 80
WIDTH = 8  # K: candidates per token, as many as the template's widest node has children


def template(nodes: int = NODES) -> tuple[tuple[int, ...], ...]:
    """The first `nodes` (1..80) nodes of the official template, each the child ranks from the root to it.

    Breadth first, the root not listed. Fewer nodes make a cheaper forward, which a CPU needs.
    """
    if not 1 <= nodes <= NODES:
        raise ValueError(f"nodes must be in [1, {NODES}], got {nodes} (drafted nodes of the tree)")
    listed: list[tuple[int, ...]] = []
    level: list[tuple[int, ...]] = [()]
    for counts in CHILDREN:
        level = [(*node, rank) for node, count in zip(level, counts, strict=True) for rank in range(count)]
        listed += level
    return tuple(listed[:nodes])


@dataclass(frozen=True, eq=False)
class Tree:
    """A draft tree as tensors; node 0 is the root, node i the template's entry i - 1.

    depth, father, rank: (N,), 0 at the root. mask: bool (N, N), mask[i, j] iff j is i or an ancestor of i.
    paths: (leaves, depth + 1), nodes from the root to each leaf in the order of the leaves, padded with -1.
    """

    depth: Tensor
    father: Tensor
    rank: Tensor
    mask: Tensor
    paths: Tensor

    @classmethod
    def of(cls, nodes: tuple[tuple[int, ...], ...], device: torch.device | str | None = None) -> Tree:
        """Raises ValueError where a node stands before its father or twice, or depths fall."""
        index: dict[tuple[int, ...], int] = {(): 0}
        for i, node in enumerate(nodes, 1):
            if node in index or node[:-1] not in index or (i > 1 and len(node) < len(nodes[i - 2])):
                raise ValueError(f"template must list each node once, breadth first; node {i} is {node}")
            index[node] = i
        listed = ((), *nodes)
        mask = torch.zeros(len(listed), len(listed), dtype=torch.bool)
        for i, node in enumerate(listed):
            mask[i, [index[node[:length]] for length in range(len(node) + 1)]] = True
        inner = {node[:-1] for node in nodes}
        leaves = [node for node in listed if node not in inner]
        paths = torch.full((len(leaves), max(map(len, listed)) + 1), -1)
        for row, leaf in zip(paths, leaves, strict=True):
            row[: len(leaf) + 1] = torch.tensor([index[leaf[:length]] for length in range(len(leaf) + 1)])
        return cls(
            depth=torch.tensor([len(node) for node in listed], device=device),
            father=torch.tensor([index[node[:-1]] for node in listed], device=device),
            rank=torch.tensor([node[-1] if node else 0 for node in listed], device=device),
            mask=mask.to(device),
            paths=paths.to(device),
        )


def visible(tree_mask: Tensor, prefix: Tensor) -> Tensor:
    """What each node may attend to, bool (B, 1, N, P + N).

    tree_mask: (N, N), as in `Tree`. prefix: (B, P), the cached tokens, 0 at padding.
    """
    B, N = prefix.shape[0], tree_mask.shape[0]
    cached = prefix.bool()[:, None, None, :].expand(B, 1, N, -1)
    return torch.cat([cached, tree_mask.bool().expand(B, 1, N, N)], dim=-1)


def draft(M: Tensor, root: Tensor, tree: Tree) -> Tensor:
    """Token ids of all nodes: M (V, K), root (...,) -> (..., N); one gather per depth.

    Raises ValueError where the tree asks for more candidates than M has.
    """
    if int(tree.rank.max()) >= M.shape[1]:
        raise ValueError(f"M must have > {int(tree.rank.max())} candidates per token for this tree, got {M.shape[1]}")
    ids = root[..., None].repeat(*[1] * root.ndim, len(tree.depth))  # (..., N)
    start = 1
    for width in tree.depth.bincount()[1:].tolist():
        level = slice(start, start + width)
        ids[..., level] = M[ids[..., tree.father[level]], tree.rank[level]]
        start += width
    return ids


def rewards(ids: Tensor, g: Tensor, paths: Tensor) -> Tensor:
    """How many drafts each path gets right before its first miss.

    ids, g: (..., N), drafted tokens and the model's own choice after each node. paths: (leaves, depth + 1),
    padded with -1. Returns (..., leaves).
    """
    before, after = paths[:, :-1].clamp(min=0), paths[:, 1:]
    right = (ids[..., after.clamp(min=0)] == g[..., before]) & (after >= 0)  # (..., leaves, depth)
    return right.long().cumprod(-1).sum(-1)


def best_path(ids: Tensor, g: Tensor, paths: Tensor) -> tuple[Tensor, Tensor]:
    """The accepted nodes, root first, of the first path with the largest reward r, and r.

    Shapes as in `rewards`. Returns nodes (..., depth + 1), -1 after the r + 1 accepted ones, and r (...,).
    The next root is g at the last accepted node.
    """
    r, leaf = _first_max(rewards(ids, g, paths))
    return _prefix(paths[leaf], r), r


def walk(ids: Tensor, x: Tensor, tree: Tree) -> tuple[Tensor, Tensor]:
    """Lossless sampling: from the root to the child that holds the token drawn at the node, until none does.

    ids: (..., N), drafts. x: (..., N), one draw per node from the model's distribution there; each is used
    once at most, so the text follows that distribution exactly. Of siblings with the same token the first is
    taken: choosing by what comes after would bias the text. Returns (nodes, r) as `best_path` does; the next
    root is x at the last accepted node.
    """
    deepest = int(tree.depth.max())
    node = torch.zeros_like(ids[..., 0])  # (...,)
    r = torch.zeros_like(node)
    nodes = [node]
    children = tree.father.clone()
    children[0] = -1  # the root is nobody's child
    for depth in range(1, deepest + 1):
        holds = (children == node[..., None]) & (ids == x.gather(-1, node[..., None]))  # (..., N)
        moved, child = _first_max((holds & (r == depth - 1)[..., None]).long())
        node = torch.where(moved > 0, child, node)
        r = r + moved
        nodes.append(node)
    return _prefix(torch.stack(nodes, dim=-1), r), r


def successors(ids: Tensor, logits: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """What a forward teaches: tokens (m,), each once, and the K likeliest after them (m, K), best first.

    ids (N,), logits (N, V): of the tree's nodes. Where a token stands at several, the last in tree order
    wins. Equal logits among the K: the smaller id first.
    """
    same = ids[:, None] == ids
    last = ~(same.triu(1).any(-1))  # (N,), no later node holds the token
    top = logits[last].topk(K, dim=-1, sorted=False).indices.sort(-1).values
    order = logits[last].gather(-1, top).argsort(dim=-1, descending=True, stable=True)
    return ids[last], top.gather(-1, order)


def update(M: Tensor, ids: Tensor, logits: Tensor) -> Tensor:
    """M (V, K) with the rows of all drafted tokens replaced by their new `successors`; same shapes."""
    tokens, rows = successors(ids, logits, M.shape[1])
    return M.index_put((tokens,), rows.to(M.dtype))


def _first_max(score: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value and its first index along the last axis."""
    best = score.amax(-1)
    return best, (score == best[..., None]).int().argmax(-1)


def _prefix(nodes: Tensor, r: Tensor) -> Tensor:
    beyond = torch.arange(nodes.shape[-1], device=nodes.device) > r[..., None]
    return nodes.masked_fill(beyond, -1)


@dataclass(frozen=True)
class TokenRecycling(Method):
    """Decodes with drafts from recycled candidates: the model's own text, greedy or sampled, in fewer forwards.

    nodes: drafted nodes, the first of the official template; 80 suit a GPU, 10 to 20 a CPU. hot: whether the table of
    candidates lives as long as the run is attached (the official way) or starts empty with each prompt.
    """

    nodes: int = param(NODES, ge=1, le=NODES, doc="drafted nodes of the tree")
    hot: bool = True

    slots: ClassVar[tuple[str, ...]] = ("decode.loop",)
    # identity() is None: the loop itself is what acts; its text is the plain model's under every setting

    def needs(self) -> set[str]:
        return {"full attention", "1-D positions"}

    def decode(self, loop: Loop) -> Tensor:
        device = loop.input_ids.device
        tree = Tree.of(template(self.nodes), device)
        M = loop.run.state.get(self)
        if M is None:
            M = torch.zeros(loop.run.anatomy.config.vocab_size, WIDTH, dtype=torch.long, device=device)
        loop.prefill()
        ids, root = loop.input_ids, loop.input_ids[0, -1]
        done = False
        while not done:
            drafts = draft(M, root, tree)  # (N,)
            logits = loop.verify(drafts[None], tree.depth, tree.mask)[0]  # (N, V)
            M = update(M, drafts, logits)
            choice = self._choose(loop, ids, drafts, logits, tree)  # (N,)
            nodes, r = walk(drafts, choice, tree) if loop.config.do_sample else best_path(drafts, choice, tree.paths)
            path = nodes[: int(r) + 1]
            new = torch.cat([drafts[path[1:]], choice[path[-1:]]])  # r drafts and the model's own next token
            taken, done = loop.stop(ids, new)
            # the cache holds every token but the newest, also where a stop cuts the path short
            loop.accept(path[:taken], len(drafts))
            ids, root = torch.cat([ids, new[None, :taken]], 1), new[taken - 1]
        if self.hot:
            loop.run.state[self] = M
        return ids

    def _choose(self, loop: Loop, ids: Tensor, drafts: Tensor, logits: Tensor, tree: Tree) -> Tensor:
        """The model's own next token after every node, greedy or drawn, under the caller's logits processors."""
        scores = logits.float()
        if loop.logits_processor:
            scores = torch.empty_like(scores)
            for depth in range(int(tree.depth.max()) + 1):  # nodes of one depth have texts of one length
                level = (tree.depth == depth).nonzero()[:, 0]
                before = tree.mask[level].nonzero()[:, 1].view(len(level), depth + 1)[:, 1:]  # the root is in ids
                text = torch.cat([ids.expand(len(level), -1), drafts[before]], 1)
                scores[level] = loop.logits_processor(text, logits[level].float())
        if loop.config.do_sample:
            return torch.multinomial(scores.softmax(-1), 1)[:, 0]
        return scores.argmax(-1)
