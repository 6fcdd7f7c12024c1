import json

import pytest

from seqwise.core.errors import UsageError
from seqwise.lab.probes.lines import read_lines

FORM = '{"text": ...}'


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def test_lines_are_read_in_their_order(tmp_path):
    path = write(tmp_path / "own.jsonl", {"text": " ä "}, "", {"text": "b", "more": 1})
    assert read_lines(path, lambda line: line.text("text"), FORM) == ["ä", "b"]


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: must be an object, got list"),
        ("{}", "line 2: field 'text' must be a text that is not empty, got nothing"),
        ({"text": "  "}, "line 2: field 'text' must be a text that is not empty, got '  '"),
        ({"text": 3}, "line 2: field 'text' .* got 3"),
    ],
)
def test_what_is_wrong_is_told_with_line_and_field(tmp_path, line, said):
    path = write(tmp_path / "own.jsonl", {"text": "a"}, line)
    with pytest.raises(UsageError, match=said):
        read_lines(path, lambda line: line.text("text"), FORM)


@pytest.mark.parametrize("value", [None, "ab", [], ["a"], ["a", ""], ["a", 1]])
def test_lists_of_texts(tmp_path, value):
    path = write(tmp_path / "own.jsonl", {"words": value})
    with pytest.raises(UsageError, match="line 1: field 'words' must be a list of 2 or more texts"):
        read_lines(path, lambda line: line.texts("words", 2), FORM)
    path = write(tmp_path / "own.jsonl", {"words": ["a", " b "]})
    assert read_lines(path, lambda line: line.texts("words", 2), FORM) == [["a", "b"]]


def test_files_without_lines(tmp_path):
    with pytest.raises(UsageError, match="has no lines; each is"):
        read_lines(write(tmp_path / "own.jsonl", "", " "), lambda line: line.text("text"), FORM)
    with pytest.raises(UsageError, match=r"cannot read .*: No such file"):
        read_lines(str(tmp_path / "none.jsonl"), lambda line: line.text("text"), FORM)
