import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from seqwise.core.errors import CacheError, UnsupportedModel
from seqwise.core.method import Method
from seqwise.core.visible import Visible
from seqwise.lab.zoo import staged
from seqwise.methods import A2SF, Recent, TransPrune
from seqwise.methods.reduce.vmtc_cmai import (
    CMAI,
    VMTC,
    _Slots,
    below_mean,
    compress,
    focus,
    importance,
    inhibit,
    lowest,
    spherical_kmeans,
)
from seqwise.testing.families import FAMILIES

IMAGE = 97  # the placeholder token of the families


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# VMTC


def plain_kmeans(x: torch.Tensor, K: int, updates: int = 10):
    """Assignment and centres, one vector at a time."""
    u = [row / row.norm() for row in x]
    R = len(u)
    centres = [u[c * R // K] for c in range(K)]

    def assigned():
        cosines = [[float(row @ centre) for centre in centres] for row in u]
        return [row.index(max(row)) for row in cosines]

    for _ in range(updates):
        found = assigned()
        for c in range(K):
            mine = [row for row, at in zip(u, found, strict=True) if at == c]
            if mine:
                mean = torch.stack(mine).mean(0)
                centres[c] = mean / mean.norm()
    return assigned(), torch.stack(centres)


def plain_compress(X: torch.Tensor, ips: torch.Tensor, P: int, K: int, weights: str = "mean"):
    """Tokens, places, and per place who is in it."""
    N = len(X)
    primary = sorted(range(N), key=lambda i: -float(ips[i]))[:P]
    rest = [i for i in range(N) if i not in primary]
    groups = {i: [i] for i in primary}
    if K:
        found, _ = plain_kmeans(X[rest], K)
        for c in range(K):
            mine = [rest[i] for i, at in enumerate(found) if at == c]
            if mine:
                groups[mine[0]] = mine
    tokens = []
    for _, mine in sorted(groups.items()):
        w = ips[mine] if weights == "ips" else torch.ones(len(mine))
        tokens.append((w[:, None] * X[mine]).sum(0) / w.sum())
    return torch.stack(tokens), sorted(groups), groups


@pytest.mark.parametrize("R, K", [(13, 3), (30, 4), (9, 9), (7, 1), (25, 11)])
def test_kmeans_equals_the_plain_loops(R, K):
    x = random(R, 5, seed=R)
    assignment, centres = spherical_kmeans(x, K)
    wanted, wanted_centres = plain_kmeans(x, K)
    assert assignment.tolist() == wanted
    torch.testing.assert_close(centres, wanted_centres)


def test_kmeans_begins_with_evenly_spread_rows_and_updates_ten_times():
    x = random(40, 3, seed=5)
    begin, centres = spherical_kmeans(x, 4, iterations=0)
    torch.testing.assert_close(centres, torch.nn.functional.normalize(x[[0, 10, 20, 30]], dim=-1))
    assert begin.tolist() == plain_kmeans(x, 4, updates=0)[0]
    differ = [u for u in range(10) if not spherical_kmeans(x, 4)[1].equal(spherical_kmeans(x, 4, iterations=u)[1])]
    assert differ[:2] == [0, 1], "updates move the centres"
    ten = spherical_kmeans(x, 4, iterations=10)
    assert spherical_kmeans(x, 4)[1].equal(ten[1]) and spherical_kmeans(x, 4)[0].equal(ten[0])


def test_kmeans_looks_at_directions_only_and_ties_go_to_the_first_centre():
    x = random(20, 4)
    lengths = torch.rand(20, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert spherical_kmeans(x, 3)[0].equal(spherical_kmeans(x * lengths, 3)[0])
    same = torch.tensor([[1.0, 0.0]]) * torch.arange(1, 7)[:, None]
    assignment, centres = spherical_kmeans(same, 3)
    assert assignment.tolist() == [0] * 6
    assert centres.tolist() == [[1.0, 0.0]] * 3  # empty clusters keep theirs


@pytest.mark.parametrize("K", [0, 8])
def test_kmeans_needs_a_centre_and_no_more_than_rows(K):
    with pytest.raises(ValueError, match=rf"K must be in \[1, 7\], got {K}"):
        spherical_kmeans(random(7, 3), K)


@pytest.mark.parametrize("weights", ["mean", "ips"])
@pytest.mark.parametrize("N, P, K", [(36, 6, 3), (36, 1, 3), (36, 0, 4), (25, 7, 0), (17, 5, 12), (9, 8, 3)])
def test_compress_equals_the_plain_steps(N, P, K, weights):
    X, ips = random(N, 6, seed=N), random(N, seed=1).exp()
    made = compress(X, ips, P, K, weights)
    tokens, place, groups = plain_compress(X, ips, P, min(K, N - P), weights)
    torch.testing.assert_close(made.tokens, tokens)
    assert made.place.tolist() == place
    wanted = [-1] * N
    for number, token in enumerate(place):
        for i in groups[token]:
            wanted[i] = number
    assert made.member.tolist() == wanted


def test_all_primary_or_a_cluster_for_each_patch_is_the_identity():
    X, ips = random(13, 4), random(13, seed=1)
    for P, K in ((13, 0), (0, 13), (4, 9), (4, 20)):
        made = compress(X, ips, P, K)
        torch.testing.assert_close(made.tokens, X)
        assert made.place.tolist() == made.member.tolist() == list(range(13))


def test_a_merged_token_is_the_mean_of_features_that_keep_their_length():
    X = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 4.0]])
    made = compress(X, torch.zeros(4), 0, 2)
    assert made.tokens.tolist() == [[2.0, 0.0], [0.0, 3.0]] and made.place.tolist() == [0, 2]
    weighted = compress(X, torch.tensor([1.0, 3.0, 1.0, 1.0]), 0, 2, "ips")
    assert weighted.tokens.tolist() == [[2.5, 0.0], [0.0, 3.0]]


def test_empty_clusters_are_left_out():
    X = torch.tensor([[0.0, 3.0]]).repeat(6, 1)
    made = compress(X, torch.arange(6.0), 2, 3)
    assert made.place.tolist() == [0, 4, 5] and made.member.tolist() == [0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("P, K", [(-1, 2), (8, 0), (2, -1)])
def test_compress_refuses_counts_that_cannot_be(P, K):
    with pytest.raises(ValueError, match=rf"P must be in \[0, 7\] and K >= 0, got P = {P}, K = {K}"):
        compress(random(7, 2), random(7), P, K)


@settings(max_examples=40, deadline=None)
@given(N=st.integers(1, 30), data=st.data(), seed=st.integers(0, 99))
def test_places_are_each_groups_first_patch_in_order(N, data, seed):
    P = data.draw(st.integers(0, N))
    K = data.draw(st.integers(0, N - P))
    made = compress(random(N, 3, seed=seed), random(N, seed=seed + 1), P, K)
    assert made.place.tolist() == sorted(set(made.place.tolist())) and len(made.place) <= P + K
    for number, place in enumerate(made.place.tolist()):
        assert (made.member == number).nonzero()[0, 0] == place
    assert (made.member >= 0).all() == (K > 0 or P == N)


def test_importance_is_a_mean_over_heads_without_cls():
    row = torch.tensor([[0.4, 0.1, 0.5], [0.2, 0.6, 0.2]])
    torch.testing.assert_close(importance(row), torch.tensor([0.35, 0.35]))
    torch.testing.assert_close(importance(row, 0), torch.tensor([0.3, 0.35, 0.35]))


@torch.no_grad()
def logits(model, batch, method: Method | None = None):
    """Logits of one forward, and the run."""
    if method is None:
        return model(**batch).logits, None
    with method.on(model) as run:
        return model(**batch).logits, run


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"].tiny()


def image_of(ids: torch.Tensor) -> torch.Tensor:
    """Per token which image it belongs to, -1 for text: every run of placeholders is one image."""
    visual = ids == IMAGE
    starts = visual & ~torch.cat([torch.tensor([False]), visual[:-1]])
    return torch.where(visual, starts.cumsum(0) - 1, -1)


@torch.no_grad()
def embedded(model, prompt, method: Method | None = None) -> torch.Tensor:
    """The rows that enter the decoder."""
    first: list[torch.Tensor] = []
    take = lambda _m, args, kwargs: first.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
    hook = model.model.language_model.layers[0].register_forward_pre_hook(take, with_kwargs=True)
    try:
        logits(model, prompt, method)
    finally:
        hook.remove()
    return first[0]


@pytest.mark.parametrize("method", [VMTC(budget=6), VMTC(budget=0.5, clusters=1), VMTC(budget=5, clusters=5)], ids=str)
def test_the_class_compresses_what_the_projector_reads(llava, method):
    prompt = FAMILIES["llava"].prompt(11, seed=6)
    tower = llava.model.vision_tower
    with torch.no_grad():
        states = tower(prompt["pixel_values"], output_hidden_states=True).hidden_states
        layer = tower.encoder.layers[len(states) - 3]  # its output is hidden state -2
        x = layer.layer_norm1(states[-3])
        q, k = (getattr(layer.self_attn, f"{n}_proj")(x).unflatten(-1, (2, -1)).transpose(1, 2) for n in "qk")
        ips = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[0, :, 0, 1:].mean(0)
        total = method.budget if isinstance(method.budget, int) else int(16 * method.budget)
        K = total // 3 if method.clusters is None else method.clusters
        tokens, place, groups = plain_compress(states[-2][0, 1:], ips, total - K, K)
        wanted = llava.model.multi_modal_projector(tokens)
    start = int((prompt["input_ids"][0] == IMAGE).nonzero()[0])
    got = embedded(llava, prompt, method)[0, start : start + len(place)]
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    _, run = logits(llava, prompt, method)
    assert [p - start for p in run.kept()[0]["input"] if 0 <= p - start < 16] == place
    members = run.members("input")[0]
    assert {at - start: [p - start for p in mine] for at, mine in members.items()} == groups


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision"])
def test_vmtc_in_a_left_padded_batch_gives_what_each_prompt_gives_alone(name):
    family = FAMILIES[name]
    model, prompts = family.tiny(), [family.prompt(17, seed=1), family.prompt(6, seed=2, images=2)]
    prompts.append(family.prompt(30, seed=3, images=0))
    for method in (VMTC(budget=0.5), VMTC(budget=12, clusters=6) | CMAI()):
        together, run = logits(model, family.pad_left(prompts), method)
        for i, prompt in enumerate(prompts):
            alone, single = logits(model, prompt, method)
            if "pixel_values" in prompt:
                assert [row for row in run.kept()[i]["input"] if row >= 0] == single.kept()[0]["input"]
            torch.testing.assert_close(together[i, -1], alone[0, -1], **family.tolerance)


def test_clusters_that_come_out_empty_make_an_image_shorter_than_another():
    family = FAMILIES["llava"]
    model, prompt = family.tiny(), family.prompt(12, seed=2, images=2)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.zero_()
    flat = prompt | {"pixel_values": prompt["pixel_values"].clone()}
    flat["pixel_values"][1] = 0.5  # its patches are all alike
    method = VMTC(budget=9, clusters=9)
    _, run = logits(model, flat, method)
    image = image_of(flat["input_ids"][0])[run.kept()[0]["input"]]
    counts = [int((image == i).sum()) for i in range(2)]
    assert counts[1] < 3 < counts[0] <= 9
    groups = run.members("input")[0]
    assert len(groups) == sum(counts) and sum(len(mine) for mine in groups.values()) == 32


def test_counts_of_vmtc_are_split_over_the_tiles_of_an_image():
    family = FAMILIES["llava_next"]
    model, prompt = family.tiny(), family.prompt(11)
    _, run = logits(model, prompt, VMTC(budget=12, clusters=0))  # three tiles
    assert int(run.segments.visual[0, run.kept()[0]["input"]].sum()) == 12


@pytest.mark.parametrize("name", ["llava", "llava_next", "llava_onevision", "qwen25_vl"])
def test_settings_that_change_nothing(name):
    family = FAMILIES[name]
    model, prompt = family.tiny(), family.prompt(11, images=2)
    methods = [CMAI().identity(), CMAI(threshold=0.0)]
    for method in methods if name == "qwen25_vl" else [VMTC().identity(), VMTC(budget=1.0, clusters=0), *methods]:
        ours, run = logits(model, prompt, method)
        torch.testing.assert_close(ours, logits(model, prompt)[0], **family.tolerance)
        assert not run.acted, method


# CMAI: the formulas


def causal_map(r: int, seed: int, heads: int = 3) -> torch.Tensor:
    """A causal attention (heads, r, r) of r tokens."""
    return random(heads, r, r, seed=seed).masked_fill(torch.ones(r, r).triu(1).bool(), float("-inf")).softmax(-1)


def test_focus_aggregates_what_earlier_text_has_read_and_is_an_average_of_it():
    A = causal_map(12, seed=0).mean(0)  # 5 image tokens, then 7 text tokens
    A_TT, A_TV = A[5:, 5:], A[5:, :5]
    F = focus(A_TT, A_TV)
    for i in range(7):
        for j in range(5):
            assert float(F[i, j]) == pytest.approx(sum(float(A_TT[i, t] * A_TV[t, j]) for t in range(i + 1)), rel=1e-5)
            assert 0 <= float(F[i, j]) <= float(A_TV[: i + 1, j].max())
    torch.testing.assert_close(F[0], A_TT[0, 0] * A_TV[0])  # one text row: a multiple of its own attention


@pytest.mark.parametrize("rho, hidden", [(0.0, 0), (0.5, 4), (0.29, 2), (1.0, 9), (1 / 3, 3)])
def test_the_lowest_share_is_hidden_in_each_row(rho, hidden):
    F = random(2, 6, 9).abs()
    found = lowest(F, rho)
    assert (found.sum(-1) == hidden).all()
    for b in range(2):
        for row, mine in zip(F[b], found[b], strict=True):
            assert set(row.argsort()[:hidden].tolist()) == set(mine.nonzero()[:, 0].tolist())


def test_a_share_that_is_whole_is_not_lost_to_rounding():
    assert 0.29 * 100 < 29
    assert lowest(random(1, 100).abs(), 0.29).sum() == 29


def test_only_columns_of_the_image_are_counted_and_hidden_and_of_equals_the_later_ones():
    F = torch.tensor([[0.0, 0.3, 0.1, 0.2, 0.1]])
    V = torch.tensor([[False, True, True, True, True]])
    assert lowest(F, 0.5, V).tolist() == [[False, False, True, False, True]]
    assert lowest(torch.ones(1, 5), 0.5, V).tolist() == [[False, False, False, True, True]]
    assert not lowest(F, 1.0, torch.zeros(1, 5, dtype=torch.bool)).any()
    assert below_mean(F, 1.0, V).tolist() == [[False, False, True, False, True]]  # their mean is 0.175


def test_the_threshold_is_strict_and_adapts_to_the_row():
    F = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    assert below_mean(F, 1.0).tolist() == [[False] * 4, [True, True, True, False]]
    assert below_mean(F, 1.01).tolist() == [[True] * 4, [True, True, True, False]]
    assert not below_mean(F, 0.0).any()


def test_inhibited_rows_still_sum_to_one():
    z = random(3, 4, 9)
    hidden = lowest(random(4, 9, seed=1).abs(), 0.5)
    P = inhibit(z, hidden)
    torch.testing.assert_close(P.sum(-1), torch.ones(3, 4))
    assert (P[:, hidden] == 0).all() and (P[:, ~hidden] > z.softmax(-1)[:, ~hidden]).all()


def test_tokens_are_found_where_each_head_holds_them():
    order = torch.tensor([[[4, 0, 2, 3], [0, 1, 3, 4]]])  # (1, 2 heads, 4 slots)
    live = torch.tensor([[[True, True, True, True], [True, False, True, True]]])
    visible = Visible(torch.tensor([[4]]), order, None, live)
    slots = _Slots.of(torch.tensor([[0, 1, 2, -1, 4]]), visible)
    assert slots.held.tolist() == [[[True, False, True, False, True], [True, False, False, False, True]]]
    A = torch.arange(16.0).view(1, 4, 1, 4)  # query heads 0, 1 of the first, 2, 3 of the second
    first = [(1 + 5) / 2, 0, (2 + 6) / 2, 0, (0 + 4) / 2]
    second = [(8 + 12) / 2, 0, 0, 0, (11 + 15) / 2]
    torch.testing.assert_close(slots.mean(A)[0, 0], (torch.tensor(first) + torch.tensor(second)) / 2)
    hidden = slots.spread(torch.tensor([[[True, True, True, True, False]]]), 4, 4)
    assert hidden[0, :, 0].tolist() == 2 * [[False, True, True, False]] + 2 * [[True, False, False, False]]


# CMAI: the class, against the decoder's layers by hand


@torch.no_grad()
def by_hand(model, method: CMAI, x: torch.Tensor, image: torch.Tensor):
    """Rows (1, n, d) of one prompt and what follows it; image: (n,). Logits, and per acting layer the hidden pairs."""
    decoder, n = model.model.language_model, x.shape[1]
    positions = torch.arange(n)[None]
    rope = decoder.rotary_emb(x, positions)
    causal = torch.full((n, n), float("-inf")).triu(1)
    begins = int((image >= 0).nonzero()[0])
    T = [i for i in range(n) if i > begins and image[i] < 0]
    before, all_hidden = None, {}
    for number, layer in enumerate(decoder.layers, 1):
        h = layer.input_layernorm(x)
        q, k, v = (getattr(layer.self_attn, f"{name}_proj")(h).unflatten(-1, (-1, 8)).transpose(1, 2) for name in "qkv")
        q, k = apply_rotary_pos_emb(q, k, *rope)
        g = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(g, 1)[0], v.repeat_interleave(g, 1)[0]
        z = q[0] @ k.mT / math.sqrt(8) + causal
        A = z.softmax(-1).mean(0)
        F = torch.full((n, n), float("nan"))
        for i in T:
            for j in range(n):
                if image[j] >= 0 and j < i:
                    F[i, j] = sum(A[i, t] * A[t, j] for t in T if t <= i)
        if number >= method.first:
            used = F if method.source == "same" else before
            hidden = torch.zeros(n, n, dtype=torch.bool)
            for i in T:
                for one in range(int(image.max()) + 1):
                    V = [j for j in range(i) if image[j] == one]
                    if method.threshold is None:
                        low = sorted(V, key=lambda j, i=i: float(used[i, j]))[: int(method.rho * len(V))]
                    else:
                        mean = sum(used[i, j] for j in V) / max(len(V), 1)
                        low = [j for j in V if used[i, j] < method.threshold * mean]
                    hidden[i, low] = True
            z = z.masked_fill(hidden, float("-inf"))
            all_hidden[number] = hidden
        before = F
        out = (z.softmax(-1) @ v).transpose(0, 1).reshape(1, n, -1)
        x = x + layer.self_attn.o_proj(out)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(decoder.norm(x)), all_hidden


VARIANTS = [
    CMAI(),
    CMAI(rho=0.3, first=1),
    CMAI(rho=1.0, first=4),
    CMAI(threshold=0.8, first=2),
    CMAI(source="previous", first=2),
    CMAI(threshold=0.7, source="previous"),
]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("method", VARIANTS, ids=str)
def test_a_prompts_text_rows_are_inhibited_as_by_hand(llava, method, images):
    prompt = FAMILIES["llava"].prompt(9, seed=6, images=images)
    ours, run = logits(llava, prompt, method)
    wanted, hidden = by_hand(llava, method, embedded(llava, prompt), image_of(prompt["input_ids"][0]))
    assert run.acted and set(hidden) == set(range(method.first, 5))
    if method.threshold is None:
        counts = {int(row.sum()) for pairs in hidden.values() for row in pairs}
        assert counts == {0, *(seen * int(method.rho * 16) for seen in range(1, images + 1))}
    torch.testing.assert_close(ours, wanted, atol=5e-5, rtol=1e-4)


def test_many_text_rows_are_worked_on_in_blocks(llava, monkeypatch):
    prompt = FAMILIES["llava"].prompt(21, seed=4)
    for method in (CMAI(), CMAI(source="previous")):
        whole, _ = logits(llava, prompt, method)
        with monkeypatch.context() as patch:
            patch.setattr("seqwise.methods.reduce.vmtc_cmai._ROWS", 4)
            torch.testing.assert_close(logits(llava, prompt, method)[0], whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [CMAI(), CMAI(threshold=0.9, source="previous")], ids=str)
def test_each_step_of_decoding_is_the_row_of_a_longer_prompt(llava, method):
    prompt = FAMILIES["llava"].prompt(9, seed=7)
    n = prompt["input_ids"].shape[1]
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with method.on(llava) as run:
        out = llava.generate(**prompt, **options)
        past = run.engine.ledger.facts["cmai"][3]
    ids = out.sequences[0, :-1]
    x = torch.cat([embedded(llava, prompt), llava.get_input_embeddings()(ids[None, n:])], 1).detach()
    wanted, _ = by_hand(llava, method, x, image_of(ids))
    torch.testing.assert_close(torch.stack(out.logits, 1), wanted[:, -5:], atol=5e-5, rtol=1e-4)
    assert past.table.shape == (1, int((image_of(ids) < 0).sum()) - 5, 16)  # without the text before the image


def test_image_rows_and_text_before_the_image_are_left_alone_to_the_bit(llava):
    prompt = FAMILIES["llava"].prompt(14, seed=3)
    ids = prompt["input_ids"][0]
    end = int((ids == IMAGE).nonzero()[-1]) + 1
    ours, _ = logits(llava, prompt, CMAI(first=1))
    none, _ = logits(llava, prompt, CMAI(rho=0.001, first=1))  # acts, but hides floor(0.016) = 0 tokens
    assert ours[:, :end].equal(none[:, :end])
    assert not torch.allclose(ours[:, end:], none[:, end:], atol=1e-2)
    torch.testing.assert_close(none, logits(llava, prompt)[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen25_vl"])
@pytest.mark.parametrize("method", [CMAI(first=2), CMAI(threshold=0.9, source="previous", first=2)], ids=str)
def test_a_left_padded_batch_gives_what_each_prompt_gives_alone(name, method):
    family = FAMILIES[name]
    model, prompts = family.tiny(), [family.prompt(17, seed=1), family.prompt(9, seed=2, images=2)]
    prompts.append(family.prompt(30, seed=3, images=0))
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    prompts = prompts[:2] if name == "qwen25_vl" else prompts
    with method.on(model):
        together = model.generate(**family.pad_left(prompts), **options)
    for i, prompt in enumerate(prompts):
        with method.on(model):
            alone = model.generate(**prompt, **options)
        assert together.sequences[i, -4:].equal(alone.sequences[0, -4:])
        for mine, theirs in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(mine[i], theirs[0], **family.tolerance)


@pytest.mark.parametrize("method", [CMAI(), CMAI(source="previous")], ids=str)
def test_text_that_comes_in_pieces_reads_what_earlier_pieces_have_read(llava, method):
    prompt = FAMILIES["llava"].prompt(20, seed=5, images=2)
    whole, _ = logits(llava, prompt, method)
    ids, cut = prompt["input_ids"], prompt["input_ids"].shape[1] - 7
    with torch.no_grad(), method.on(llava):
        first = llava(input_ids=ids[:, :cut], pixel_values=prompt["pixel_values"])
        pieces = [first.logits, llava(input_ids=ids[:, cut : cut + 4], cache=first.cache).logits]
        pieces += [llava(input_ids=ids[:, [at]], cache=first.cache).logits for at in range(cut + 4, cut + 7)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=5e-5, rtol=1e-4)


def test_a_second_turn_brings_a_second_image_with_a_mask_of_its_own(llava):
    family, method = FAMILIES["llava"], CMAI(first=1)
    first, second = family.prompt(8, seed=1), family.prompt(7, seed=2)
    with torch.no_grad(), method.on(llava) as run:
        cache = llava(**first).cache
        run.begin_prompt()
        last = llava(input_ids=second["input_ids"], pixel_values=second["pixel_values"], cache=cache).logits
        assert run.engine.ledger.facts["marks"]["cmai"].max() == 1
    x = torch.cat([embedded(llava, first), embedded(llava, second)], 1)
    image = image_of(torch.cat([first["input_ids"], second["input_ids"]], 1)[0])
    wanted, _ = by_hand(llava, method, x, image)
    torch.testing.assert_close(last, wanted[:, first["input_ids"].shape[1] :], atol=5e-5, rtol=1e-4)


def test_beams_take_what_was_read_along(llava):
    family, method = FAMILIES["llava"], CMAI(first=1)
    batch = family.pad_left([family.prompt(17, seed=1), family.prompt(9, seed=2, images=2)])
    n = batch["input_ids"].shape[1]
    with torch.no_grad(), method.on(llava) as run:
        out = llava.generate(
            **batch, max_new_tokens=6, do_sample=False, num_beams=3, return_dict_in_generate=True, output_scores=True
        )
    # the beams' own scores, from each returned sequence given as a whole
    for b in range(2):
        mask = torch.cat([batch["attention_mask"][b : b + 1], torch.ones(1, 6, dtype=torch.long)], 1)
        pixels = batch["pixel_values"][:1] if b == 0 else batch["pixel_values"][1:]
        with torch.no_grad(), method.on(llava):
            whole = llava(input_ids=out.sequences[b : b + 1], attention_mask=mask, pixel_values=pixels).logits
        steps = whole[0, n - 1 : -1].log_softmax(-1).gather(-1, out.sequences[b, n:, None]).sum()
        assert float(steps) / 6 == pytest.approx(float(out.sequences_scores[b]), abs=1e-3)
    assert run.engine.ledger.facts["cmai"][2].table.shape[0] == 6


def test_compressed_images_are_inhibited_among_the_tokens_that_are_left(llava):
    prompt, vmtc = FAMILIES["llava"].prompt(9, seed=8), VMTC(budget=8, clusters=4)
    ours, run = logits(llava, prompt, vmtc | CMAI())
    image = image_of(prompt["input_ids"][0])[run.kept()[0]["input"]]
    wanted, hidden = by_hand(llava, CMAI(), embedded(llava, prompt, vmtc), image)
    left = int((image == 0).sum())
    assert left < 16 and {int(row.sum()) for row in hidden[3]} == {0, left // 2}
    torch.testing.assert_close(ours, wanted, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("source", ["same", "previous"])
def test_rows_that_are_cut_between_layers_are_no_columns_any_more(llava, source):
    prompt = FAMILIES["llava"].prompt(14, seed=8)
    cut = TransPrune(prune_after=(3,), budget=(0.5,), layers=(1, 3))
    with cut.on(llava) as run, torch.no_grad():
        llava(**prompt)
        kept = run.kept()[0]["layer 3"]
    method = CMAI(rho=1.0, first=4, source=source)  # behind the cut all that is left is hidden
    ours, run = logits(llava, prompt, cut | method)
    assert run.kept()[0]["layer 3"] == kept
    assert run.engine.ledger.facts["cmai"][3].columns.shape[1] == 8
    assert ours.isfinite().all()


def test_what_another_method_evicts_is_no_column_any_more(llava):
    prompt = FAMILIES["llava"].prompt(20, seed=9)
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def generated(method):
        with method.on(llava) as run:
            return torch.stack(llava.generate(**prompt, **options).logits), run

    alone, _ = generated(CMAI())
    torch.testing.assert_close(generated(CMAI() | A2SF(budget=1.0))[0], alone, atol=5e-5, rtol=1e-4)
    # with no image token left there is nothing to hide: eviction alone gives the same steps
    evict = Recent(budget=6)
    torch.testing.assert_close(
        generated(CMAI(rho=1.0, first=1) | evict)[0][1:].isfinite(), torch.ones(5, 1, 101, dtype=torch.bool)
    )
    both, run = generated(CMAI(first=1) | A2SF(budget=0.5))
    assert both.isfinite().all() and not torch.allclose(both, generated(A2SF(budget=0.5))[0], atol=1e-2)


def test_a_model_with_masks_of_its_own_keeps_them():
    """The staged model hides the image from text in its first two layers: there is nothing to see or to inhibit."""
    model = staged.build(0)
    drawn = staged.batch(2, seed=1, questions=2)
    batch = {"input_ids": drawn.input_ids, "pixel_values": drawn.pixel_values}
    rows: list[torch.Tensor] = []
    hook = model.model.language_model.layers[1].register_forward_hook(lambda _m, _a, out: rows.append(out))
    plain, _ = logits(model, batch)
    ours, _ = logits(model, batch, CMAI(first=1))
    hook.remove()
    torch.testing.assert_close(rows[1], rows[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(ours, plain, atol=1e-3)


def test_a_saved_context_cannot_be_continued(llava, tmp_path):
    prompt = FAMILIES["llava"].prompt(12, seed=3)
    with torch.no_grad(), CMAI().on(llava) as run:
        llava(**prompt)
        path = run.save(tmp_path / "context.safetensors")
    with torch.no_grad(), CMAI().on(llava) as run:
        cache = run.load(path)
        with pytest.raises(CacheError, match=r"CMAI\(\) needs what the prompt's text has read of the image"):
            llava(input_ids=torch.tensor([[5]]), cache=cache)


def test_a_prompt_without_image_is_left_alone(llava):
    prompt = FAMILIES["llava"].prompt(12, images=0)
    for method in (VMTC(), CMAI(first=1)):
        with method.on(llava) as run:
            out = llava.generate(**prompt, max_new_tokens=3, do_sample=False)
        assert out.equal(llava.generate(**prompt, max_new_tokens=3, do_sample=False)) and not run.acted


def test_attention_work_counts_both_softmaxes(llava):
    prompt = FAMILIES["llava"].prompt(14, seed=3)
    _, run = logits(llava, prompt, CMAI())
    assert 1 < run.report().attention_work < 2


def test_what_cannot_work_on_a_model_is_refused(llava):
    with pytest.raises(UnsupportedModel, match=r"CMAI\.first must be <= 4, the decoder layers of Llava.*, got 5"):
        CMAI(first=5).on(llava)
    for method in (VMTC(), CMAI()):
        with pytest.raises(UnsupportedModel, match="vision tower"):
            method.on(FAMILIES["llama"].tiny())
    with pytest.raises(UnsupportedModel, match="of several patches or of images of any size"):
        VMTC().on(FAMILIES["qwen25_vl"].tiny())


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda: VMTC(budget=0), r"VMTC\.budget must be a whole number of tokens >= 1 or a share in .*, got 0"),
        (lambda: VMTC(budget=4, clusters=5), r"VMTC\.clusters must be <= budget \(4\), got 5"),
        (lambda: VMTC(clusters=-1), r"VMTC\.clusters must be >= 0, got -1"),
        (lambda: VMTC(weights="sum"), r"VMTC\.weights must be one of 'mean', 'ips', got 'sum'"),
        (lambda: CMAI(rho=1.5), r"CMAI\.rho must be in \[0, 1\], got 1\.5"),
        (lambda: CMAI(threshold=-0.5), r"CMAI\.threshold must be >= 0, got -0\.5"),
        (lambda: CMAI(first=0), r"CMAI\.first must be >= 1, got 0"),
        (lambda: CMAI(first=1, source="previous"), r"CMAI\.first must be >= 2 with source='previous', got 1"),
        (lambda: CMAI(source="next"), r"CMAI\.source must be one of 'same', 'previous', got 'next'"),
    ],
)
def test_bad_fields_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
