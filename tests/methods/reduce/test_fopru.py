from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqwise.methods.reduce.fopru import rank_strategy, row_strategy, significance


def attention(heads: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, heads, n, n, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_significance_of_all_rows_counts_the_cls_row_but_no_cls_column():
    A = attention(heads=3, n=8)
    s = significance(A.sum(-2))
    for b in range(2):
        for j in range(7):
            wanted = sum(A[b, h, i, 1 + j] for h in range(3) for i in range(8)) / 3
            torch.testing.assert_close(s[b, j], wanted)


def test_significance_of_the_cls_row():
    A = attention(heads=3, n=8)
    torch.testing.assert_close(significance(A[..., 0, :]), A[..., 0, 1:].mean(1))


def test_significance_without_special_tokens_keeps_every_column():
    A = attention(heads=2, n=6)
    torch.testing.assert_close(significance(A.sum(-2), specials=0), A.mean(1).sum(-2))


def test_both_strategies_on_a_grid_read_by_eye():
    s = torch.tensor([[1.0, 9.0, 0.0], [4.0, 4.0, 4.0], [0.0, 8.0, 2.0]]).flatten()
    assert rank_strategy(s, 0.25).tolist() == [1, 7]  # floor(0.25 * 9) = 2
    assert row_strategy(s, 0.4, (3, 3)).tolist() == [3, 4, 5]  # floor(0.4 * 3) = 1, sums 10, 12, 10
    assert row_strategy(s, 0.7, (3, 3)).tolist() == [0, 1, 2, 3, 4, 5]  # the tie goes to the earlier row


def test_all_tokens_kept_at_ratio_one():
    s = torch.rand(2, 15, generator=torch.Generator().manual_seed(1))
    for kept in (rank_strategy(s, 1.0), row_strategy(s, 1.0, (3, 5))):
        assert kept.tolist() == [list(range(15))] * 2


def test_at_least_one_token_or_one_row_stays():
    s = torch.rand(2, 15, generator=torch.Generator().manual_seed(2))
    assert rank_strategy(s, 0.002).tolist() == s.argmax(-1, keepdim=True).tolist()
    best = s.view(2, 3, 5).sum(-1).argmax(-1)
    assert row_strategy(s, 0.002, (3, 5)).tolist() == [[5 * r + c for c in range(5)] for r in best.tolist()]


def test_equal_scores_go_to_the_earlier_token():
    assert rank_strategy(torch.ones(9), 0.5).tolist() == [0, 1, 2, 3]
    assert row_strategy(torch.ones(9), 0.7, (3, 3)).tolist() == [0, 1, 2, 3, 4, 5]


def test_row_strategy_refuses_a_grid_that_leaves_a_cls_score_over():
    with pytest.raises(ValueError, match=r"grid must hold all 10 scores, got 3 x 3"):
        row_strategy(torch.rand(10), 0.5, (3, 3))


grids = st.tuples(st.integers(1, 4), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(grid=grids, r=st.floats(0.01, 1.0), seed=st.integers(0, 10_000))
def test_kept_sets_are_the_best_of_their_kind(grid, r, seed):
    H, W = grid
    s = torch.randint(1, 50, (H * W,), generator=torch.Generator().manual_seed(seed)).float()
    rank, row = rank_strategy(s, r), row_strategy(s, r, grid)
    for kept in (rank, row):
        assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(rank) == max(1, int(r * H * W)) and len(row) == W * max(1, int(r * H))
    assert s[rank].sum() == max(s[list(c)].sum() for c in combinations(range(H * W), len(rank)))
    sums = s.view(H, W).sum(-1)
    assert s[row].sum() == max(sums[list(c)].sum() for c in combinations(range(H), len(row) // W))
    assert s[rank_strategy(s, (len(row) + 1e-6) / (H * W))].sum() >= s[row].sum()
