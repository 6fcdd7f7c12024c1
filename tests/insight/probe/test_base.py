import math

import pytest
import torch

from seqwise.core.errors import PromptError
from seqwise.insight.probe.base import ROWS, padded, surprisals, token_surprisals
from seqwise.lab.zoo.recall import recall_model


def test_padding_is_on_the_right_and_masked():
    ids, mask = padded([[5, 6, 7], torch.tensor([8])])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("sequences, said", [([], "at least one text"), ([[1], []], "text 2 of 2")])
def test_nothing_to_score_is_refused(sequences, said):
    with pytest.raises(PromptError, match=said):
        surprisals(recall_model(0), sequences)


def test_surprisal_is_what_the_tokens_before_leave_open():
    logits = torch.tensor([[[0.0, math.log(3.0)], [math.log(9.0), 0.0], [5.0, 5.0]]])
    found = token_surprisals(logits, torch.tensor([[0, 1, 1]]))
    assert math.isnan(found[0, 0])
    assert found[0, 1:].tolist() == pytest.approx([-math.log(0.75), -math.log(0.1)])
    assert token_surprisals(logits[:, :1], torch.tensor([[1]])).isnan().all()


def test_half_precision_is_summed_in_single():
    logits = torch.zeros(1, 2, 50_000, dtype=torch.bfloat16)
    found = token_surprisals(logits, torch.tensor([[1, 2]]))
    assert found.dtype == torch.float32 and float(found[0, 1]) == pytest.approx(math.log(50_000), abs=1e-4)


def test_a_batch_gives_what_each_text_gives_alone():
    """More texts than one pass takes, of all lengths; the order is the caller's."""
    model = recall_model(0)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(240, (n,), generator=generator).tolist() for n in (5, 17, 1, 9, 30, 2, 3, 8, 11, 6, 4)]
    assert len(texts) > ROWS
    model.train()
    found = surprisals(model, texts)
    assert model.training and not found[0].requires_grad
    for text, one in zip(texts, found, strict=True):
        with torch.no_grad():
            logps = model(torch.tensor([text])).logits[0].log_softmax(-1)
        alone = [-float(logps[t - 1, text[t]]) for t in range(1, len(text))]
        assert len(one) == len(text) and math.isnan(one[0])
        assert one[1:].tolist() == pytest.approx(alone, abs=1e-5)
