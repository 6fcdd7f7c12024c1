import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from seqwise.core.errors import MissingExtra, UsageError
from seqwise.lab import tasks
from seqwise.lab.tasks import (
    TASKS,
    Agreement,
    File,
    KeyValue,
    Needle,
    Needles,
    Output,
    Perplexity,
    Prompt,
    Task,
    answered,
    encode,
    encode_answer,
    greedy_match,
    mean_kl,
    mean_logprob,
    task,
)
from seqwise.lab.zoo.text import count, paragraphs

CHAT = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>\n{% endfor %}<s>assistant{{ '\n' }}"
GENERATED = [name for name in TASKS if name != "file"]


def trained(pre, decoder, **more):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre, decoder
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(paragraphs()[:200], trainer)
    start = [("<s>", core.token_to_id("<s>"))]
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)  # adds BOS when asked
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **more)


@pytest.fixture(scope="module")
def plain():
    return trained(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


@pytest.fixture(scope="module")
def greedy():
    """No pre-tokenizer: tokens merge across words, lines and so across every border."""
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel())
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def chat():
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def smollm2():
    from seqwise.lab.zoo import load_model

    try:
        return load_model()[1]
    except MissingExtra as error:
        pytest.skip(str(error))


TOKENIZERS = ["plain", "chat", "greedy", "smollm2"]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", GENERATED)
def test_parts_join_to_the_whole_prompt(name, kind, request):
    tokenizer = request.getfixturevalue(name)
    for prompt in task(kind).prompts(tokenizer, 3, 1, 301):
        context, question = encode(tokenizer, prompt)
        assert context.dtype == question.dtype == torch.long and context.shape[0] == question.shape[0] == 1
        if not prompt.question:
            whole = tokenizer(prompt.context)["input_ids"]
        elif tokenizer.chat_template:
            message = {"role": "user", "content": f"{prompt.context}\n\n{prompt.question}"}
            text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
            whole = tokenizer(text + prompt.prefix, add_special_tokens=False)["input_ids"]
        else:
            whole = tokenizer(f"{prompt.context}\n\n{prompt.question}\n{prompt.prefix}")["input_ids"]
        assert torch.cat([context, question], 1)[0].tolist() == whole
        # apart also in content: the question is all in its part, the context but for a merged end in its own
        assert prompt.question in tokenizer.decode(question[0])
        assert question.shape[1] == 0 or prompt.context[:-12] in tokenizer.decode(context[0])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_context_part_does_not_depend_on_the_question(name, request):
    """What a method sees before the question must not tell which one comes."""
    tokenizer = request.getfixturevalue(name)
    (prompt,) = Needles().prompts(tokenizer, 1, 0, 200)
    first, _ = encode(tokenizer, prompt)
    second, _ = encode(tokenizer, Prompt(prompt.context, "And who is asking?", "nobody"))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_answer_ids_spell_the_answer(name, request):
    tokenizer = request.getfixturevalue(name)
    (prompt,) = Needle().prompts(tokenizer, 1, 0, 200)
    assert tokenizer.decode(encode_answer(tokenizer, prompt)[0]) == f" {prompt.answer}"  # a word after the prefix
    bare = Prompt("Some text.", "What?", "123456")  # after the reply's header, a line break
    assert tokenizer.decode(encode_answer(tokenizer, bare)[0]) == "123456"


@pytest.mark.parametrize("name", ["plain", "chat", "smollm2"])
def test_a_continuation_is_the_texts_own_tokens(name, request):
    tokenizer = request.getfixturevalue(name)
    for prompt in Perplexity(continuation=33).prompts(tokenizer, 3, 0, 100):
        context, question = encode(tokenizer, prompt)
        answer = encode_answer(tokenizer, prompt)
        assert question.shape == (1, 0)
        whole = tokenizer(prompt.context + prompt.answer)["input_ids"]
        assert torch.cat([context, answer], 1)[0].tolist() == whole
        assert answer.shape[1] >= 25


def test_a_template_that_rewrites_the_message_is_refused(chat):
    other = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    other.chat_template = CHAT.replace("| trim", "| upper")
    with pytest.raises(UsageError, match="chat template rewrites the user message"):
        encode(other, Prompt("some context", "why?", "so"))


@pytest.mark.parametrize("kind", GENERATED)
@pytest.mark.parametrize("length", [150, 333])
def test_contexts_fill_their_length_and_never_exceed_it(kind, length, plain):
    for prompt in task(kind).prompts(plain, 6, 0, length):
        assert length - 12 <= count(prompt.context, plain) <= length


@pytest.mark.parametrize("kind", GENERATED)
def test_prompts_depend_on_seed_and_index_alone(kind, plain):
    few, many = (task(kind).prompts(plain, n, 5, 200) for n in (2, 4))
    assert many[:2] == few
    assert len({prompt.context for prompt in many}) == 4
    assert task(kind).prompts(plain, 2, 6, 200) != few


def test_needle_stands_once_and_at_its_depth(plain):
    depths = (0.0, 0.3, 1.0)
    for i, prompt in enumerate(Needle(depths=depths).prompts(plain, 6, 0, 400)):
        assert len(re.findall(prompt.answer, prompt.context)) == 1
        assert prompt.facts["depth"] == depths[i % 3]
        place = prompt.context.index("The secret number is") / len(prompt.context)
        assert abs(place - prompt.facts["depth"]) < 0.15  # the nearest end of a sentence
        assert prompt.answer not in prompt.question + prompt.prefix
    first, _, last = Needle(depths=depths).prompts(plain, 3, 0, 400)
    assert first.context.startswith("The secret number is") and last.context.endswith(f"{last.answer}.")


@pytest.mark.parametrize(
    "kind, told", [(Needles(needles=5), "secret number of the"), (KeyValue(pairs=5), "of the key")]
)
def test_one_of_several_is_asked(kind, told, plain):
    prompts = kind.prompts(plain, 12, 0, 400)
    for prompt in prompts:
        pairs = re.findall(rf"{told} (\w+) is (\d{{6}})\.", prompt.context)
        assert len(dict(pairs)) == len({number for _, number in pairs}) == 5
        assert dict(pairs)[prompt.facts["key"]] == prompt.answer
        assert prompt.facts["key"] in prompt.question and prompt.facts["key"] in prompt.prefix
    ranks = {re.findall(r"\d{6}", prompt.context).index(prompt.answer) for prompt in prompts}
    assert len(ranks) >= 4  # the asked one is not always at the same place


def test_key_value_lines_are_one_list(plain):
    (prompt,) = KeyValue(pairs=3).prompts(plain, 1, 2, 300)
    assert re.search(r"(The value of the key \w+ is \d{6}\.\n){2}The value of the key \w+ is \d{6}\.", prompt.context)


@pytest.mark.parametrize("kind, length", [(Needle(), 20), (Needles(needles=8), 100), (Perplexity(), 3)])
def test_lengths_that_cannot_hold_the_task_are_refused(kind, length, plain):
    with pytest.raises(UsageError, match=rf"length must be >= \d+ tokens for this task, got {length}"):
        kind.prompts(plain, 1, 0, length)


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: Needle(depths=(1.5,)), "depths"),
        (lambda: Needle(depths=()), "depths"),
        (lambda: Needles(needles=1), "needles"),
        (lambda: KeyValue(pairs=0), "pairs"),
        (lambda: Agreement(continuation=0), "continuation"),
    ],
)
def test_bad_fields_are_named(make, field):
    with pytest.raises(ValueError, match=rf"\.{field} must .*, got"):
        make()


@pytest.mark.parametrize(
    "text, answer, right",
    [
        (" 123456.", "123456", True),
        ("The number is 123,456!", "123456", True),
        ("In 2020 it was 123456", "123456", True),  # numbers of another size do not count
        ("654321, or else 123456", "123456", False),  # the first one does
        ("1234567", "123456", False),
        ("100000,123456", "123456", False),
        ("no idea", "123456", False),
        ("She went to  new\nYork.", "New York", True),
        ("newyork", "York", False),
        ("(3.5%)", "3.5", True),
        ("13.5", "3.5", False),
        ("C++ it is", "C++", True),
    ],
)
def test_answered(text, answer, right):
    assert answered(text, answer) is right


def test_mean_logprob_is_the_mean_over_tokens():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 6, 3, 3, 1], [2, 2, 5, 4, 0]])
    expected = [sum(math.log(torch.softmax(logits[b, t], -1)[ids[b, t]]) for t in range(5)) / 5 for b in range(2)]
    torch.testing.assert_close(mean_logprob(logits, ids), torch.tensor(expected))


@given(st.integers(0, 2**31))
def test_kl_against_its_definition(seed):
    ours, full = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(seed))
    p, q = full.softmax(-1), ours.softmax(-1)
    torch.testing.assert_close(mean_kl(ours, full), (p * (p / q).log()).sum(-1).mean(), rtol=1e-4, atol=1e-6)
    assert mean_kl(full, full + 3.0).abs() < 1e-6
    assert greedy_match(full, full) == 1.0


def test_kl_survives_impossible_tokens_and_half_precision():
    full = torch.tensor([[0.0, 1.0, float("-inf")]])
    assert torch.isfinite(mean_kl(torch.tensor([[0.0, 1.0, -5.0]]), full))
    assert mean_kl(full.bfloat16(), full).dtype == torch.float32


def test_greedy_match_counts_positions():
    full = torch.eye(4)
    assert greedy_match(full[[0, 1, 3, 2]], full) == 0.5


def test_scores():
    logits, ids = torch.zeros(3, 10), torch.tensor([1, 2, 3])
    prompt = Prompt("c", "q", "123456")
    assert Needle().score(prompt, Output("123456")) == {"accuracy": 1.0}
    scores = Needle().score(prompt, Output("nothing", logits, ids))
    assert scores == {"accuracy": 0.0, "logprob": pytest.approx(-math.log(10))}
    assert Perplexity().score(prompt, Output(logits=logits, answer_ids=ids)) == {"nll": pytest.approx(math.log(10))}
    agreement = Agreement().score(prompt, Output(logits=logits, full_logits=logits))
    assert agreement == {"match": 1.0, "kl": pytest.approx(0.0, abs=1e-6)}
    assert Agreement().score(prompt, Output(logits=logits)) == Perplexity().score(prompt, Output()) == {}
    for kind in (Needle, Perplexity, Agreement):
        assert set(kind.metrics.values()) <= {"higher", "lower"}


@pytest.mark.parametrize("name", GENERATED)
def test_tasks_are_read_by_name_and_by_words(name):
    assert task(name) == TASKS[name]()
    assert Task.parse(str(task(name))) == task(name)
    assert task(str(Needle(depths=(0.5,)))) == Needle(depths=(0.5,))


@pytest.mark.parametrize("text", ["nedle", "", "file", "file:", "Needle(depth=1)", "Perplexity(continuation=x)"])
def test_unreadable_tasks_are_refused(text):
    with pytest.raises(UsageError):
        task(text)


def write(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return File(path=str(path))


GOOD = json.dumps({"context": " Müller sells\ntea. ", "question": "What?\n", "answer": " tea "})


def test_file_lines(tmp_path, chat):
    kind = write(tmp_path / "q.jsonl", GOOD, "", GOOD)
    assert task(f"file:{tmp_path}/q.jsonl") == kind
    first, second = kind.prompts(chat, 9, 0, 5)
    assert first == Prompt("Müller sells\ntea.", "What?", "tea", facts={"line": 1})
    assert second.facts == {"line": 3}
    assert kind.prompts(chat, 1, 0, 5) == [first]
    context, question = encode(chat, first)  # a template that trims finds it whole
    assert "tea." in chat.decode(context[0]) and "What?" in chat.decode(question[0])


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be an object, got list"),
        ('{"context": "a", "question": "b"}', "line 2: field 'answer' must be a text that is not empty, got nothing"),
        ('{"context": "a", "question": 3, "answer": "c"}', "line 2: field 'question' must .* got 3"),
        ('{"context": " ", "question": "b", "answer": "c"}', "line 2: field 'context' must .* got ' '"),
    ],
)
def test_bad_file_lines_name_file_line_and_field(tmp_path, plain, line, message):
    with pytest.raises(UsageError, match=rf"q\.jsonl, {message}"):
        write(tmp_path / "q.jsonl", GOOD, line).prompts(plain, 1, 0, 5)


def test_missing_empty_and_binary_files(tmp_path, plain):
    with pytest.raises(UsageError, match=r"cannot read .*none\.jsonl: No such file"):
        File(path=str(tmp_path / "none.jsonl")).prompts(plain, 1, 0, 5)
    with pytest.raises(UsageError, match=r"q\.jsonl has no lines"):
        write(tmp_path / "q.jsonl", "", " ").prompts(plain, 1, 0, 5)
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"cannot read .*b\.jsonl"):
        File(path=str(tmp_path / "b.jsonl")).prompts(plain, 1, 0, 5)


def test_nouns_are_distinct_and_not_part_of_each_other():
    assert len(set(tasks.NOUNS)) == len(tasks.NOUNS)
    assert not [(a, b) for a in tasks.NOUNS for b in tasks.NOUNS if a != b and a in b]
