"""Folders that belong to one run, and files that are whole or as they were."""

import errno
import pathlib

import pytest

from specjax.training import folders


def test_other_settings_are_refused_and_equal_ones_are_not(tmp_path):
    path = tmp_path / "new" / "settings.json"
    folders.claim(path, {"seed": 0, "layers": (1, 2)})
    folders.claim(path, {"seed": 0, "layers": [1, 2]})
    with pytest.raises(ValueError, match="new holds what was made with seed=0, and 1 is asked for"):
        folders.claim(path, {"seed": 1, "layers": (1, 2)})
    with pytest.raises(ValueError, match="layers=.1, 2., and None is asked for"):
        folders.claim(path, {"seed": 0})
    with pytest.raises(ValueError, match="steps=None, and 3 is asked for"):
        folders.claim(path, {"seed": 0, "layers": (1, 2), "steps": 3})


def test_some_settings_may_be_asked_for_alone(tmp_path):
    path = tmp_path / "settings.json"
    folders.check(path, {"seed": 1})
    folders.claim(path, {"seed": 0, "layers": 2})
    folders.check(path, {"seed": 0})
    with pytest.raises(ValueError, match="seed=0, and 1 is asked for"):
        folders.check(path, {"seed": 1})
    for useless in ("{", "[]"):
        path.write_text(useless)
        with pytest.raises(ValueError, match="settings.json cannot be used.*give another folder"):
            folders.check(path, {"seed": 0})


def test_a_full_disk_leaves_what_stood_there(tmp_path, monkeypatch):
    path = tmp_path / "card.json"
    folders.write(path, "first")
    write = pathlib.Path.write_text

    def full(self, text, **options):
        write(self, text[:2], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    with pytest.raises(ValueError, match="card.json cannot be written.*No space left.*make room"):
        folders.write(path, "second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_what_is_appended_stands_behind_or_is_refused(tmp_path):
    path = tmp_path / "lines"
    for line in ("first\n", "second\n"):
        folders.append(path, line)
    assert path.read_text() == "first\nsecond\n"
    with pytest.raises(ValueError, match="/dev/full cannot be written.*No space left.*make room"):
        folders.append("/dev/full", "third\n")
