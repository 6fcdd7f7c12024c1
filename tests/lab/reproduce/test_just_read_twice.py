import pytest
import torch

import seqwise.lab.reproduce.just_read_twice as module
from seqwise.methods.order.just_read_twice import JRTModel


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_prompts_of_all_formats_hold_the_same_pairs_and_questions():
    batches = {name: module.prompts(10, name, generator()) for name in module.FORMATS}
    D, answers = batches["D Q"][0][:, :-1], batches["D Q"][1]
    Q = batches["D Q"][0][:, -1:]
    for name, (ids, wanted) in batches.items():
        assert ids.equal(torch.cat([{"D": D, "Q": Q}[piece] for piece in name.split()], 1)), name
        assert wanted.equal(answers)
    for pairs, question, answer in zip(D.tolist(), Q[:, 0].tolist(), answers.tolist(), strict=True):
        held = dict(divmod(pair, module.VALUES) for pair in pairs)
        assert len(held) == module.KEYS == len(pairs)
        assert answer == module.VALUE_ID + held[question - module.KEY_ID]


def test_a_state_is_smaller_than_the_context():
    state = module.reader(0)(torch.arange(3)[None])[1][0]
    assert state[1].shape == (1, 1, 7) and module.KEYS > 7


def test_the_two_finders_differ_by_what_they_may_read():
    causal, both = module.finder(0, 0), module.finder(0, 39)
    ids, _ = module.sets(4, module.SHORT, module.LONG, generator())
    other = ids.clone()
    other[:, -2] = 4 + (other[:, -2] - 3) % (module.IDS - 4)
    assert other[:, -2].ne(ids[:, -2]).all()
    with torch.no_grad():
        assert causal(ids)[0][:, :-2].equal(causal(other)[0][:, :-2])
        assert (both(ids)[0][:, 0] - both(other)[0][:, 0]).abs().max() > 1e-5
        assert [s.shape for s in causal(ids)[1][1]] == [s.shape for s in both(ids)[1][1]], "states of one size"


@pytest.mark.parametrize("layers", [1, 2])
def test_in_one_layer_a_second_reading_changes_nothing(layers):
    torch.manual_seed(0)
    model = JRTModel(module.VOCABULARY, 16, 1, kinds=("linear",) * layers, prefix=0, feature_dim=2).double()
    once, _ = module.prompts(5, "Q D Q", generator())
    twice = torch.cat([once, once], 1)  # each token twice, the question at the end too
    with torch.no_grad():
        difference = (model(once)[0][:, -1] - model(twice)[0][:, -1]).abs().max()
    assert difference < 1e-9 if layers == 1 else difference > 1e-4


def test_measures_every_testable_claim_once_per_example(monkeypatch):
    for name, value in {"SET_STEPS": 2, "PROMPT_STEPS": 2, "BATCH": 2, "EXAMPLES": 5}.items():
        monkeypatch.setattr(module, name, value)
    found = module.REPRODUCTION.measure(0, lambda text: None)
    assert set(found) == {claim.key for claim in module.REPRODUCTION.testable}
    assert all(len(measured.ours) == len(measured.baseline) == 5 for measured in found.values())
    assert module.REPRODUCTION.measure(0, lambda text: None) == found


def test_training_learns():
    losses = []
    for steps in (1, 60):
        model = module.train(
            module.reader(0), lambda step, draws: module.prompts(16, "D Q", draws), 0, steps, module.PROMPT_RATE
        )
        ids, answers = module.prompts(100, "D Q", generator(9))
        with torch.no_grad():
            losses.append(float(torch.nn.functional.cross_entropy(model(ids)[0][:, -1], answers)))
    assert losses[1] < losses[0] - 1
