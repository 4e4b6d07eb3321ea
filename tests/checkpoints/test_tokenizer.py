"""Token ids against llama.cpp's, exact round trips, streaming, chat templates, and refusals."""

import json
import pathlib

import numpy as np
import pytest

from specjax import checkpoints

GOLDEN = pathlib.Path(__file__).parent / "golden" / "tokenizer.json"
CASES = json.loads(GOLDEN.read_text())
TEXTS = [case["text"] for case in CASES]
IDS = [f"text{index}" for index in range(len(CASES))]
MESSAGES = [
    {"role": "user", "content": "Hi, 12 é!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_ids_equal_llama_cpp(smollm2, case):
    assert smollm2.tokenizer.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize("text", TEXTS, ids=IDS)
def test_round_trip_is_exact(smollm2, text):
    tokenizer = smollm2.tokenizer
    assert tokenizer.decode(tokenizer.encode(text), keep_special=True) == text


def test_every_token_decodes_and_random_text_survives(smollm2):
    tokenizer = smollm2.tokenizer
    generator = np.random.default_rng(0)
    for token in range(tokenizer.vocab_size):
        assert isinstance(tokenizer.decode([token], keep_special=True), str)
    for _ in range(200):
        points = generator.integers(0x20, 0x11000, size=30)
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text), keep_special=True) == text


def test_control_tokens_are_written_only_when_asked(smollm2):
    tokenizer = smollm2.tokenizer
    ids = tokenizer.encode("a<|im_end|>b")
    assert tokenizer.eos_ids == (2,) and 2 in ids
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(np.asarray(ids), keep_special=True) == "a<|im_end|>b"
    assert tokenizer.vocab_size == 49152


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("keep_special", [False, True])
def test_stream_equals_decode_and_never_splits_a_character(smollm2, size, keep_special):
    tokenizer = smollm2.tokenizer
    for text in TEXTS:
        ids = tokenizer.encode(text)
        stream = tokenizer.stream(keep_special)
        pieces = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, keep_special)


def test_stream_of_arbitrary_ids_equals_decode(smollm2):
    tokenizer = smollm2.tokenizer
    generator = np.random.default_rng(1)
    # The first 300 ids hold all single bytes, so most sequences are not valid UTF-8.
    for _ in range(200):
        ids = generator.integers(0, 300, size=20).tolist()
        stream = tokenizer.stream()
        text = "".join(stream.push([token]) for token in ids) + stream.flush()
        assert text == tokenizer.decode(ids)


def test_stream_flushes_half_a_character_and_starts_afresh(smollm2):
    tokenizer = smollm2.tokenizer
    ids = tokenizer.encode("👍🏽")
    stream = tokenizer.stream()
    assert "".join(stream.push(ids[:1])) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(tokenizer.encode("ok")) == "ok"
    assert stream.flush() == ""


def test_chat_renders_the_template(smollm2):
    text = smollm2.tokenizer.decode(smollm2.tokenizer.chat(MESSAGES), keep_special=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi, 12 "
        "é!<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    closed = smollm2.tokenizer.chat(MESSAGES, add_generation_prompt=False)
    assert text.startswith(smollm2.tokenizer.decode(closed, keep_special=True))
    assert closed[-2:] == smollm2.tokenizer.encode("<|im_end|>\n")
    assert smollm2.chat("Bye") == smollm2.chat([{"role": "user", "content": "Bye"}])


def test_a_follow_up_is_the_rest_of_the_conversation(smollm2):
    tokenizer = smollm2.tokenizer
    whole = tokenizer.chat(MESSAGES)
    first = tokenizer.chat(MESSAGES[:-2])
    hello = tokenizer.encode("Hello.")
    ended = [*hello, tokenizer.eos_ids[0]]
    assert first + ended + tokenizer.follow_up("Bye", ended) == whole
    assert first + hello + tokenizer.follow_up("Bye", hello) == whole
    assert tokenizer.follow_up("Bye", []) == tokenizer.follow_up("Bye", hello)
    with pytest.raises(ValueError, match="as it is given"):
        wordless("{{ messages[-1].content }}").follow_up("a", [])


@pytest.mark.parametrize(
    ("messages", "told"),
    [([], "at least one"), ([{"role": "user"}], "content"), (["hi"], "content"), ("hi", "list")],
)
def test_chat_refuses_bad_messages(smollm2, messages, told):
    with pytest.raises(ValueError, match=told):
        smollm2.tokenizer.chat(messages)


def wordless(template, **more):
    """A tokenizer of single bytes with control tokens <s> and </s>, built from GGUF metadata."""
    pytest.importorskip("tokenizers")
    from tokenizers import pre_tokenizers

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*tokens, "<s>", "</s>"],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": template,
    }
    return checkpoints.Tokenizer.from_gguf({**metadata, **more})


def test_template_has_the_settings_and_functions_of_hugging_face():
    template = (
        "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role == 'skip' %}{% continue %}{% "
        "endif %}\n"
        "{{ m | tojson }}\n{% endfor %}\n{{ eos_token }}{{ strftime_now('%%') }}"
    )
    tokenizer = wordless(template)
    ids = tokenizer.chat([{"role": "skip", "content": ""}, {"role": "user", "content": "<é>"}])
    assert ids[0] == 256 and 257 in ids
    text = tokenizer.decode(ids, keep_special=True)
    assert text == '<s>\n{"role": "user", "content": "<é>"}\n</s>%'


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for %}", "not valid"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}", "refuses"),
        (None, "no chat template"),
    ],
)
def test_template_errors_are_told(template, told):
    with pytest.raises(ValueError, match=told):
        wordless(template).chat([{"role": "user", "content": "x"}])


def test_pre_tokenizers_split_digits_differently(smollm2):
    tokens = smollm2.tokenizer.encode("1234567")
    assert len(tokens) == 7
    merged = {
        "tokenizer.ggml.tokens": ["1", "2", "3", "12", "123", "1231", "</s>", "<s>", "32"],
        "tokenizer.ggml.token_type": [1] * 6 + [3, 3, 1],
        "tokenizer.ggml.merges": ["1 2", "12 3", "123 1"],
        "tokenizer.ggml.bos_token_id": 7,
        "tokenizer.ggml.eos_token_id": 6,
    }
    found = {
        pre: wordless("", **{**merged, "tokenizer.ggml.pre": pre}).encode("1231</s>32")
        for pre in ("smollm", "gpt-2", "llama-bpe")
    }
    assert found == {
        "smollm": [0, 1, 2, 0, 6, 2, 1],
        "gpt-2": [5, 6, 2, 1],
        # Words that are tokens are taken whole, whatever the merges say.
        "llama-bpe": [4, 0, 6, 8],
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tokenizer.ggml.pre": "deepseek-coder"}, "deepseek-coder"),
        ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre"),
        ({"tokenizer.ggml.model": "llama"}, "'llama'"),
        ({"tokenizer.ggml.merges": None}, "merges"),
        ({"tokenizer.ggml.merges": ["xx yy"]}, "merges holds 'xx yy'"),
        ({"tokenizer.ggml.merges": ["Ā ā"]}, "merges holds 'Ā ā'"),
        ({"tokenizer.ggml.merges": ["a"]}, "merges holds 'a'"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "types"),
        ({"tokenizer.ggml.eos_token_id": 999}, "999"),
    ],
)
def test_unknown_tokenizers_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        wordless("", **change)


@pytest.mark.parametrize("token", [-1, 49152, 10**6])
def test_ids_outside_the_vocabulary_are_refused(smollm2, token):
    with pytest.raises(ValueError, match=str(token)):
        smollm2.tokenizer.decode([5, token])
    with pytest.raises(ValueError, match=str(token)):
        smollm2.tokenizer.stream().push([token])


def test_half_a_surrogate_pair_is_refused(smollm2):
    with pytest.raises(ValueError, match="surrogate"):
        smollm2.tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    "character", ["\x04", "\x06", "\x13", "\x14", "\x16", "\x1d", "\U00040000"]
)
def test_characters_without_a_token_are_refused_not_dropped(smollm2, character):
    with pytest.raises(ValueError, match="at 3, for which the vocabulary has no token"):
        smollm2.tokenizer.encode("é 1" + character + "x")


def test_tokenizer_file_that_is_none_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="no such file"):
        checkpoints.Tokenizer.from_file(path)
    path.write_text('{"model": 3}')
    with pytest.raises(ValueError, match="not a tokenizer"):
        checkpoints.Tokenizer.from_file(path)
