import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.core.errors import PromptError, UnsupportedModel
from seqwise.methods.baselines import Recent
from seqwise.methods.decode.token_recycling import (
    TokenRecycling,
    Tree,
    best_path,
    draft,
    rewards,
    successors,
    template,
    update,
    visible,
    walk,
)
from seqwise.testing.families import FAMILIES


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_official_template():
    nodes = template()
    assert len(nodes) == 80 and len(set(nodes)) == 80
    assert [sum(len(node) == depth for node in nodes) for depth in range(1, 7)] == [8, 21, 25, 15, 8, 3]
    assert max(max(node) for node in nodes) == 7
    assert list(nodes) == sorted(nodes, key=lambda node: (len(node), node)), "parents in order, then rank"
    assert nodes[:10] == ((0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,), (0, 0), (0, 1))
    tree = Tree.of(nodes)
    assert tree.paths.shape == (40, 7)
    assert [int((tree.paths[:, d] >= 0).sum()) for d in (0, 1)] == [40, 40]


@pytest.mark.parametrize("count", [1, 9, 20, 80])
def test_tree_tensors_equal_their_definitions(count):
    nodes = template(count)
    tree, listed = Tree.of(nodes), [(), *nodes]
    for i, node in enumerate(listed):
        assert tree.depth[i] == len(node)
        assert listed[int(tree.father[i])] == node[:-1]
        assert tree.rank[i] == (node[-1] if node else 0)
        for j, other in enumerate(listed):
            assert bool(tree.mask[i, j]) == (node[: len(other)] == other)
    leaves = [n for n in listed if not any(m[:-1] == n and m != n for m in nodes)]
    paths = [[listed[i] for i in row.tolist() if i >= 0] for row in tree.paths]
    assert [path[-1] for path in paths] == leaves
    assert paths == [[leaf[:d] for d in range(len(leaf) + 1)] for leaf in leaves]


@pytest.mark.parametrize("count", [0, 81, -1])
def test_refuses_other_sizes(count):
    with pytest.raises(ValueError, match=rf"nodes must be in \[1, 80\], got {count}"):
        template(count)


@pytest.mark.parametrize("nodes", [((0, 0), (0,)), ((0,), (0,)), ((0,), (0, 0), (1,)), ((),)])
def test_refuses_trees_in_another_order(nodes):
    with pytest.raises(ValueError, match="breadth first"):
        Tree.of(nodes)


@pytest.mark.parametrize("count", [5, 20, 80])
def test_draft_follows_the_table(count):
    tree, V, K = Tree.of(template(count)), 50, 8
    M = torch.randint(V, (V, K), generator=generator())
    roots = torch.tensor([[3, 7], [0, 49]])
    ids = draft(M, roots, tree)
    assert ids.shape == (2, 2, count + 1)
    for b in range(2):
        for c in range(2):
            expected = [int(roots[b, c])]
            for node in template(count):
                token = int(roots[b, c])
                for rank in node:
                    token = int(M[token, rank])
                expected.append(token)
            assert ids[b, c].tolist() == expected


def test_a_narrow_table_is_refused_for_a_wide_tree():
    with pytest.raises(ValueError, match="M must have > 7 candidates per token for this tree, got 4"):
        draft(torch.zeros(9, 4, dtype=torch.long), torch.tensor(0), Tree.of(template()))


def plain_rewards(ids, g, paths):
    out = []
    for path in paths.tolist():
        r = 0
        while r + 1 < len(path) and path[r + 1] >= 0 and ids[path[r + 1]] == g[path[r]]:
            r += 1
        out.append(r)
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 9, 33, 80]), st.integers(1, 4))
def test_best_path_is_the_first_longest(seed, count, V):
    tree = Tree.of(template(count))
    ids, g = torch.randint(V, (2, 3, count + 1), generator=generator(seed))
    r = rewards(ids, g, tree.paths)
    nodes, best = best_path(ids, g, tree.paths)
    for b in range(3):
        expected = plain_rewards(ids[b].tolist(), g[b].tolist(), tree.paths)
        assert r[b].tolist() == expected
        assert best[b] == max(expected)
        path = tree.paths[expected.index(max(expected))].tolist()
        accepted = path[: max(expected) + 1]
        assert nodes[b].tolist() == accepted + [-1] * (len(path) - len(accepted))


def test_padding_never_counts_as_accepted():
    tree = Tree.of(((0,), (1,), (0, 0)))
    assert tree.paths.tolist() == [[0, 2, -1], [0, 1, 3]]
    ids = torch.tensor([5, 5, 6, 7])
    g = torch.tensor([6, 0, 5, 0])  # node 2 is right; padding would read node 0: 5 = g[2]
    assert rewards(ids, g, tree.paths).tolist() == [1, 0]


def test_cold_table_of_zeros_drafts_equal_siblings_and_takes_the_first_path():
    tree = Tree.of(template(12))
    ids = draft(torch.zeros(4, 8, dtype=torch.long), torch.tensor(2), tree)
    nodes, r = best_path(ids, torch.zeros_like(ids), tree.paths)
    assert r == 2 and nodes.tolist() == tree.paths[(tree.paths >= 0).sum(-1).argmax()].tolist()


def plain_walk(ids, x, nodes):
    listed, node, accepted = [(), *nodes], (), [0]
    while True:
        children = [i for i, n in enumerate(listed) if len(n) == len(node) + 1 and n[:-1] == node]
        match = [i for i in children if ids[i] == x[accepted[-1]]]
        if not match:
            return accepted
        accepted.append(match[0])
        node = listed[match[0]]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1, 9, 33, 80]), st.integers(1, 4))
def test_walk_moves_to_the_first_child_that_holds_the_draw(seed, count, V):
    tree = Tree.of(template(count))
    ids, x = torch.randint(V, (2, 3, count + 1), generator=generator(seed))
    nodes, r = walk(ids, x, tree)
    for b in range(3):
        accepted = plain_walk(ids[b].tolist(), x[b].tolist(), template(count))
        assert r[b] == len(accepted) - 1
        assert nodes[b].tolist() == accepted + [-1] * (tree.paths.shape[1] - len(accepted))


def test_walk_samples_the_target_distribution():
    """Two tokens from a chain over V = 3, with repeated siblings: pair frequencies equal the chain's."""
    tree = Tree.of(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0)))
    chain = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.1, 0.1, 0.8]])
    ids = torch.tensor([0, 1, 1, 2, 0, 2, 0])  # the draft at 2 repeats 1; only 0 and 2 may follow the first 1
    draws = 60_000
    x = torch.multinomial(chain[ids], draws, replacement=True, generator=generator()).T  # (draws, N)
    nodes, r = walk(ids.expand(draws, -1), x, tree)
    last = nodes.gather(-1, r[:, None])
    bonus = x.gather(-1, last)[:, 0]
    first = torch.where(r >= 1, ids[nodes[:, 1].clamp(min=0)], bonus)
    second = torch.where(r >= 2, ids[nodes[:, 2].clamp(min=0)], bonus)
    more = torch.multinomial(chain[first], 1, generator=generator(1))[:, 0]
    second = torch.where(r == 0, more, second)  # the next step's draw
    seen = torch.bincount(first * 3 + second, minlength=9) / draws
    torch.testing.assert_close(seen, (chain[0][:, None] * chain).flatten(), rtol=0, atol=0.01)


def test_update_writes_the_best_tokens_of_every_node_and_the_last_node_wins():
    V, K = 30, 8
    M = torch.zeros(V, K, dtype=torch.long)
    ids = torch.tensor([4, 9, 4, 7, 9, 4])
    logits = torch.randn(6, V, generator=generator())
    new = update(M, ids, logits)
    expected = M.clone()
    for i, token in enumerate(ids.tolist()):
        expected[token] = logits[i].argsort(descending=True)[:K]
    assert new.tolist() == expected.tolist()
    assert (M == 0).all(), "the given table is left alone"
    tokens, rows = successors(ids, logits, K)
    assert tokens.tolist() == [7, 9, 4] and rows.shape == (3, K)


def test_any_width_of_the_table_and_ties_by_id():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]])
    assert successors(torch.tensor([0]), logits, 4)[1].tolist() == [[1, 3, 2, 4]]
    assert update(torch.zeros(5, 1, dtype=torch.int32), torch.tensor([2]), logits)[2].dtype == torch.int32


def test_mask_joins_the_padded_prefix_and_the_tree():
    tree = Tree.of(((0,), (0, 0)))
    mask = visible(tree.mask, torch.tensor([[0, 1], [1, 1]]))
    assert mask.shape == (2, 1, 3, 5)
    assert mask[0, 0].int().tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert mask[1, 0, :, :2].all()


def test_a_chain_language_is_drafted_right_after_one_pass():
    """Drafts, greedy verification and recycling together give the greedy text in fewer forwards."""
    V = 12
    follow = torch.randperm(V, generator=generator(3))
    table = torch.full((V, V), -5.0).scatter_(1, follow[:, None], 5.0)
    table += 0.1 * torch.randn(V, V, generator=generator(4))
    tree = Tree.of(template(20))
    M, root, text, forwards = torch.zeros(V, 8, dtype=torch.long), torch.tensor(1), [1], 0
    while len(text) < 40:
        ids = draft(M, root, tree)
        logits = table[ids]
        g = logits.argmax(-1)
        nodes, r = best_path(ids, g, tree.paths)
        text += ids[nodes[1 : int(r) + 1]].tolist()
        root = g[nodes[int(r)]]
        text.append(int(root))
        M, forwards = update(M, ids, logits), forwards + 1
    greedy = [1]
    while len(greedy) < len(text):
        greedy.append(int(table[greedy[-1]].argmax()))
    assert text == greedy
    assert forwards < 25


# the method on a model


def llama():
    return FAMILIES["llama"].tiny()


def ids_of(n, seed=0):
    return FAMILIES["llama"].prompt(n, seed)["input_ids"]


def generate(model, ids, new=16, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options)


@pytest.mark.parametrize(
    "method", [TokenRecycling(), TokenRecycling(nodes=13, hot=False), TokenRecycling(nodes=1)], ids=str
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "neox"])
def test_text_is_the_plain_models_for_hot_and_cold_tables_and_any_tree(family, method):
    model = FAMILIES[family].tiny()
    prompts = [ids_of(n, seed=n) for n in (2, 17)]
    plain = [generate(model, ids) for ids in prompts]
    with method.on(model) as run:
        for ids, expected in zip(prompts * 2, plain * 2, strict=True):
            assert generate(model, ids).equal(expected)
            assert run.acted
    assert generate(model, prompts[1]).equal(plain[1])


def test_a_prompt_of_one_token():
    model, ids = llama(), ids_of(1)
    with TokenRecycling(nodes=20).on(model):
        assert generate(model, ids).equal(generate(llama(), ids))


def test_a_prompt_of_one_token_after_another():
    model, ids = llama(), ids_of(1)
    with TokenRecycling(nodes=20).on(model):
        generate(model, ids_of(9))
        assert generate(model, ids).equal(generate(llama(), ids))


def test_the_cache_holds_all_but_the_newest_token_and_can_be_continued():
    model, ids = llama(), ids_of(20)
    first, whole = generate(model, ids, 9), generate(model, ids, 21)
    for method in (TokenRecycling(nodes=20), TokenRecycling(nodes=20) | Recent(budget=1.0)):
        with method.on(model) as run:
            once = generate(model, ids, 9)
            assert once.equal(first)
            assert run.kept(0)[0] == [list(range(28))] * 2  # per KV head, 20 + 9 - 1 tokens
            assert generate(model, once, 12, cache=run.cache).equal(whole), method


def test_stops_at_the_end_token_and_at_the_limit():
    model, ids = llama(), ids_of(12)
    plain = generate(model, ids, 24)[0]
    with TokenRecycling(nodes=40).on(model):
        for new in (1, 2, 7, 7):
            assert generate(model, ids, new).tolist() == [plain[: 12 + new].tolist()]
        for _ in range(2):  # hot: the second time more of it is drafted
            for at in range(12, 28, 3):
                end = int(plain[at])
                cut = plain[: 12 + plain[12:].tolist().index(end) + 1]
                assert generate(model, ids, 24, eos_token_id=end).tolist() == [cut.tolist()]


def test_left_padding_changes_nothing():
    model, ids = llama(), ids_of(15)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), ids], 1)
    mask = (torch.arange(21) >= 6).long()[None]
    with TokenRecycling(nodes=30).on(model):
        together = model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert together[0, 6:].equal(generate(model, ids, 20)[0])


def test_logits_processors_see_the_path_of_each_node():
    model, ids = llama(), ids_of(15)
    options = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    expected = generate(model, ids, 24, **options)
    assert not expected.equal(generate(model, ids, 24)), "the processors must matter here"
    with TokenRecycling(nodes=40).on(model):
        for _ in range(2):
            assert generate(model, ids, 24, **options).equal(expected)


class Calls:
    """Counts calls of the model."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_hook(self.hook)

    def hook(self, *_):
        self.count += 1


def test_hot_tables_last_as_long_as_the_run_and_save_forwards():
    model, ids = llama(), ids_of(15)
    calls, spent = Calls(model), {}
    for method in (TokenRecycling(nodes=40), TokenRecycling(nodes=40, hot=False)):
        with method.on(model) as run:
            for turn in (1, 2):
                before = calls.count
                generate(model, ids, 40)
                spent[method.hot, turn] = calls.count - before
            assert (method in run.state) == method.hot
    assert spent[True, 1] == spent[False, 1] == spent[False, 2]
    assert spent[True, 2] < spent[True, 1], "the same text again is drafted from the table"
    with TokenRecycling(nodes=40).on(model):
        before = calls.count
        generate(model, ids, 40)
    assert calls.count - before == spent[True, 1], "a new run starts cold"


def test_sampled_text_follows_the_models_distribution():
    """Each of 400 words is one draw from three; how often each rank comes is compared with its probability."""
    model, ids, n = llama(), ids_of(9), 400
    calls = Calls(model)
    with TokenRecycling(nodes=20).on(model), torch.random.fork_rng():
        torch.manual_seed(0)
        options = {"max_new_tokens": n, "do_sample": True, "temperature": 1.5, "top_k": 3}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert calls.count < 0.8 * n, "many words must come from drafts, or the walk is not tested"
    with torch.no_grad():
        kept = (model(text).logits[0, 8:-1] / 1.5).topk(3)  # (n, 3)
    p = kept.values.softmax(-1)
    drawn = kept.indices == text[0, 9:, None]
    assert drawn.any(-1).all()
    deviation = (drawn.float() - p).sum(0) / (p * (1 - p)).sum(0).sqrt()  # of unit variance, for each rank
    assert deviation.abs().max() < 3.5, deviation


def test_refuses_batches_beams_and_models_it_cannot_compact():
    model, ids = llama(), ids_of(9)
    with TokenRecycling().on(model):
        with pytest.raises(PromptError, match=r"TokenRecycling\(.*\) decodes one prompt at a time, got a batch of 2"):
            generate(model, ids.expand(2, -1))
        with pytest.raises(PromptError, match="does not search beams"):
            generate(model, ids, num_beams=2)
    with pytest.raises(UnsupportedModel, match="TokenRecycling"):
        TokenRecycling().on(FAMILIES["mistral"].tiny())
    for nodes in (0, 81):
        with pytest.raises(ValueError, match=rf"TokenRecycling.nodes must be in \[1, 80\], got {nodes}"):
            TokenRecycling(nodes=nodes)
