"""Files of prompts: what is none is named."""

import pytest

from experiments import prompt_files


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no prompts"),
        ('{"turns": "hi"}', "line 1.*'hi'.*a list of texts"),
        ('{"turns": ["a"]}\n{"turns": []}', "line 2"),
        ('{"turns": ["a", 3]}', "line 1"),
        ('{"turn": ["a"]}', "line 1.*turns"),
    ],
)
def test_prompts_that_are_none_are_named(tmp_path, text, message):
    (tmp_path / "prompts").write_text(text)
    with pytest.raises(ValueError, match=message):
        prompt_files.read(str(tmp_path / "prompts"))
