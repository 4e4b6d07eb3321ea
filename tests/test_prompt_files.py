"""Files of prompts: what is none is named."""

import json

import pytest

from experiments import prompt_files


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ('{"turns": "hi"}', "line 1.*'hi'.*a list of texts"),
        ('{"turns": ["a"]}\n{"turns": []}', "line 2"),
        ('{"turns": ["a", 3]}', "line 1"),
        ('{"turn": ["a"]}', "line 1, prompt: None must be a text; or give `turns`"),
        ('{"messages": [{"role": "system", "content": "a"}]}', "line 1, messages: .*the user's"),
        ('{"messages": ["a"]}', "line 1, messages: .*a list of messages"),
        ('{"prompt": "a", "group": 3}', "line 1, group: 3 must be a text"),
        ('{"prompt": "a"}\n[1]', "line 2: .1. is no object"),
        ('{"prompt": "a"', "line 1: Expecting"),
    ],
)
def test_prompts_that_are_none_are_named(tmp_path, text, message):
    (tmp_path / "prompts").write_text(text)
    with pytest.raises(ValueError, match=message):
        prompt_files.read(str(tmp_path / "prompts"))


def test_what_a_line_may_hold(tmp_path):
    system, user, said = ({"role": r, "content": r[0]} for r in ("system", "user", "assistant"))
    lines = [
        {"turns": ["a", "b"], "category": "math"},
        {"messages": [system, user, said, user], "group": "chat"},
        {"prompt": "c\u2028d", "question_id": "x"},
        {"prompt": "c\u2028d", "question_id": "x"},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    first, second, third = prompt_files.read(str(path))
    assert (first.group, first.turns, first.question) == ("multi_turn", ("a", "b"), 1)
    assert (second.group, second.turns, second.system) == ("chat", ("u", "u"), "s")
    assert (third.group, third.turns, third.question) == ("own", ("c\u2028d",), "x")
