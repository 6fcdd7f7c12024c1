"""Facts of a prompt's tokens, read off ids."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from seqwise.core.errors import MissingExtra, PromptError
from seqwise.core.prepare import prepare
from seqwise.core.segments import IMAGE, PAD, TEXT, Segments, by_order, look_up

X = 90  # the image placeholder


def test_images_are_runs_of_placeholders_and_padding_is_no_text():
    ids = torch.tensor([[0, 0, 5, X, X, 6, X, 7], [5, X, 6, 7, 8, X, X, X]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    facts = Segments.infer(ids, mask, X)
    assert facts.type.tolist() == [
        [PAD, PAD, TEXT, IMAGE, IMAGE, TEXT, IMAGE, TEXT],
        [TEXT, IMAGE, TEXT, TEXT, TEXT, IMAGE, IMAGE, IMAGE],
    ]
    assert facts.image.tolist() == [[-1, -1, -1, 0, 0, -1, 1, -1], [-1, 0, -1, -1, -1, 1, 1, 1]]
    assert torch.equal(facts.visual, ids == X) and torch.equal(facts.real, mask.bool())
    for name in ("tile", "row", "column", "set", "member"):
        assert (getattr(facts, name) == -1).all()


def test_an_image_may_open_the_prompt_and_padding_hides_a_placeholder():
    facts = Segments.infer(torch.tensor([[X, X, 3, X]]), torch.tensor([[0, 1, 1, 1]]), X)
    assert facts.type.tolist() == [[PAD, IMAGE, TEXT, IMAGE]]


def test_a_text_model_has_text_only():
    facts = Segments.infer(torch.tensor([[1, X, 2]]), None, None)
    assert facts.type.tolist() == [[TEXT] * 3] and not facts.visual.any() and facts.real.all()


def test_every_fact_has_one_entry_per_token():
    good = torch.zeros(1, 4, dtype=torch.long)
    names = [spec.name for spec in fields(Segments)]
    values = dict.fromkeys(names, good) | {"box": torch.zeros(1, 4, 4)}
    for name in names[1:]:
        shape = "1, 4, 4" if name == "box" else "1, 4"
        with pytest.raises(PromptError, match=rf"^segments\.{name} must have shape \({shape}\), got \(1, 3\)$"):
            Segments(**values | {name: good[:, :3]})
    with pytest.raises(PromptError, match=r"^segments\.type must have shape \(4,\), got \(4,\)$"):
        Segments(**dict.fromkeys(names, good[0]))
    bare = Segments(**{name: good for name in names if name not in ("part", "box")})
    assert (bare.part == -1).all() and bare.box.isnan().all() and not bare.has("box") and bare.has("set")


def test_an_image_of_as_many_tokens_as_the_grid_has_cells_is_laid_out_in_raster_order():
    ids = torch.tensor([[X, X, X, X, X, X, 5, X, X]])
    facts = Segments.infer(ids, None, X, (2, 3))
    assert facts.row.tolist() == [[0, 0, 0, 1, 1, 1, -1, -1, -1]]
    assert facts.column.tolist() == [[0, 1, 2, 0, 1, 2, -1, -1, -1]]


def test_facts_follow_tokens_that_are_taken_repeated_and_padded():
    facts = Segments.infer(torch.tensor([[5, X, 6]]), None, X)
    taken = facts.take(torch.tensor([[2, 1]]), torch.tensor([[True, False]]))
    assert taken.type.tolist() == [[TEXT, PAD]] and taken.image.tolist() == [[-1, -1]]
    assert facts.repeat(2).type.tolist() == [[TEXT, IMAGE, TEXT]] * 2
    joined = Segments.padded([facts, facts.columns(1, 2)], 4)
    assert joined.type.tolist() == [[PAD, TEXT, IMAGE, TEXT], [PAD, PAD, PAD, IMAGE]]
    assert joined.box.shape == (2, 4, 4)


def test_facts_by_original_position_have_a_place_for_tokens_that_are_not_in_the_prompt():
    table = by_order(torch.tensor([[7, 8, 9], [7, 8, 9]]), torch.tensor([[0, 1, 2], [-1, 0, 1]]))
    assert look_up(table, torch.tensor([[2, 0, -1, 5], [1, 0, 2, -1]])).tolist() == [[9, 7, -1, -1], [9, 8, -1, -1]]
    assert look_up(table, torch.tensor([[[1, -1]]])).tolist() == [[[8, -1]], [[9, -1]]]


class Processor:
    """The part of a processor that `prepare` uses."""

    image_token = "<image>"

    def __init__(self, **attributes):
        vars(self).update(attributes)
        self.asked = None

    @property
    def tokenizer(self):
        return self

    def convert_tokens_to_ids(self, token):
        assert token == "<image>"
        return X

    def apply_chat_template(self, messages, **options):
        self.asked = messages, options
        return {
            "input_ids": torch.tensor([[5, X, X, 6]]),
            "attention_mask": torch.ones(1, 4),
            "pixel_values": torch.zeros(1),
        }


@pytest.mark.parametrize("attributes", [{}, {"image_token_id": X}])
def test_prepare_gives_the_batch_and_its_facts(attributes):
    processor = Processor(**attributes)
    messages = [{"role": "user", "content": "hello"}]
    batch, facts = prepare(processor, messages, do_resize=False)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values"}
    assert facts.type.tolist() == [[TEXT, IMAGE, IMAGE, TEXT]]
    asked, options = processor.asked
    assert (
        asked is messages and options["tokenize"] and options["add_generation_prompt"] and options["do_resize"] is False
    )


def test_a_tokenizer_alone_prepares_text():
    class Tokenizer:
        def apply_chat_template(self, messages, **options):
            return {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2)}

    batch, facts = prepare(Tokenizer(), [])
    assert facts.type.tolist() == [[TEXT, TEXT]] and batch["input_ids"].tolist() == [[5, 6]]


def test_a_missing_processor_names_what_to_install():
    with pytest.raises(MissingExtra, match="pip install torchvision"):
        prepare(None, [])
