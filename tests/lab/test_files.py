import json
from pathlib import Path

import pytest

from seqwise.lab.files import cache_dir, write_json


def test_cache_dir_order(monkeypatch, tmp_path):
    monkeypatch.setenv("SEQWISE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SEQWISE_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "seqwise"
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # empty counts as unset
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == Path(tmp_path) / ".cache" / "seqwise"


def test_write_json_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": 1})
    write_json(path, {"x": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"x": "ä"}
    assert [file.name for file in path.parent.iterdir()] == ["b.json"]


@pytest.mark.parametrize("bad, error", [({"x": float("nan")}, ValueError), ({"x": object()}, TypeError)])
def test_write_json_keeps_the_old_file_when_it_cannot_write(tmp_path, bad, error):
    path = tmp_path / "b.json"
    write_json(path, {"x": 1})
    with pytest.raises(error):
        write_json(path, bad)
    assert json.loads(path.read_text()) == {"x": 1}


def test_a_failing_rename_leaves_no_litter(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "b.json", {})
    assert list(tmp_path.iterdir()) == []
