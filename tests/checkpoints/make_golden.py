"""Writes the golden files of tests/checkpoints, without any code of specjax.

Token ids come from llama.cpp (llama-cpp-python), logits from PyTorch and transformers in float32,
both reading the GGUF file with their own readers. Run it where these are installed:

    python tests/checkpoints/make_golden.py SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import importlib
import json
import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"

TEXTS = [
    "",
    " ",
    "a",
    "Hello, world!",
    " leading space",
    "   three leading spaces and two trailing  ",
    "line\nbreak\n\n\nthree breaks\r\nwindows break\r",
    "\ttab\t\ttabs\n\t\tindented",
    "Digits 1234567890 and 3.14159, 1,000,000 and x2y33.",
    "Other digits: ٣٤٥ ४५६ ² ½ Ⅻ ①",
    "it's they're we've I'm you'll he'd IT'S THEY'RE don't",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "汉字と仮名、한글 และ עברית العربية",
    "👍🏽 👨‍👩‍👧‍👦 🇺🇦 🙂🙃",
    "e\u0301 versus \u00e9, zero\u200bwidth, nbsp\u00a0here, \ufeffmark, \ufffd",
    "def f(x: int) -> int:\n    return x ** 2 + 0x1F  # comment\n\n\nprint(f(10))\n",
    '{"key": [1, 2.5e-3, null, true], "nested": {"a\\n": "\\u00e9"}}',
    "https://example.org/path?query=1&other=two#part user@example.org",
    "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <|im_end|> c<|im_end|><|im_end|>",
    "<|im_start <|im_end| > <repo_name>x<file_sep> <|unknown|>",
    "\x00\x01\x7f control characters \x1b[0m",
    "word " * 20 + "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "!!!???...---___***///\\\\\\ ~`@#$%^&*()[]{}<>|;:'\"",
]

POSITIONS, COLUMNS = 16, 32


def prompts() -> dict[str, tuple[str, int]]:
    """Texts by name, each with the number of tokens kept of it."""
    function = (
        "def {name}(values, limit={number}):\n"
        '    """Returns the {name} of values up to the limit."""\n'
        "    result = []\n"
        "    for index, value in enumerate(values):\n"
        "        if value > limit or index % {number} == {rest}:\n"
        "            continue\n"
        "        result.append({name}_step(value, index + {rest}))\n"
        "    return result\n\n\n"
    )
    names = ["total", "median", "running_mean", "first_gap", "spread", "clip", "rank", "fold"]
    code = "".join(
        function.format(name=name, number=7 * index + 13, rest=index)
        for index, name in enumerate(names * 3)
    )
    story = (
        "The ferry left the harbour an hour before sunrise, and nobody on the quay waved. Mira "
        "stood at the rail with her collar up and counted the lights behind her until the fog had "
        "taken the last one. She had a letter in her pocket that she had read eleven times, a "
        "borrowed coat, and the address of a man who repaired clocks. The sea was flat. A boy "
        "beside her asked whether the island had wolves, and she told him that it had only goats "
        "and one very old bicycle. He thought about this for a while. Then he asked who was "
        "allowed to ride the bicycle, and she said that in winter it belonged to the doctor and "
        "in summer to whoever got up first. When the engine stopped, the silence was so complete "
        "that she could hear the rope fall on the stones. "
    )
    rows = "".join(
        f"| {1900 + 7 * i} | station {chr(65 + i % 26)}{i} | {(i * 37) % 101}.{i % 10} mm | "
        f"{'dry' if i % 3 else 'wet'} |\n"
        for i in range(60)
    )
    chat = (
        "<|im_start|>user\nWrite a short poem about {0}, then list {1} facts about it.<|im_end|>\n"
        "<|im_start|>assistant\nHere is a poem about {0}:\n\nO {0}, quiet and slow,\nwhere do you "
        "go?\n\n"
        "And {1} facts follow, though I am sure of fewer.<|im_end|>\n"
    )
    topics = ["rivers", "копійки", "clouds", "chess", "tea", "glaciers", "bridges", "moths", "salt"]
    talk = "".join(chat.format(topic, index + 2) for index, topic in enumerate(topics))
    return {
        "question": (
            "<|im_start|>user\nWhy is the sky blue by day, and why is the sunset so "
            "red?<|im_end|>\n",
            20,
        ),
        "code": (code, 100),
        "story": (story * 2, 300),
        "table": ("Rainfall by year.\n\n" + rows, 600),
        "talk": (talk + code + story, 1000),
    }


def write_tokens(tokenize) -> None:
    """Writes tokenizer.json; `tokenize` turns a text into ids, control tokens recognised."""
    cases = [{"text": text, "ids": tokenize(text)} for text in TEXTS]
    _write(GOLDEN / "tokenizer.json", cases)


def write_logits(tokenize, path: pathlib.Path) -> None:
    """Writes logits.json, from transformers' own reading of the GGUF file at `path`."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cases = []
    for name, (text, length) in prompts().items():
        ids = tokenize(text)[:length]
        if len(ids) != length:
            raise SystemExit(f"prompt {name!r} has only {len(ids)} of {length} tokens")
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].numpy()
        top = np.partition(logits, -2, axis=-1)[:, -2:]
        rows = np.unique(np.linspace(0, length - 1, POSITIONS).astype(int))
        likely = np.unique(logits[rows].argmax(-1))[: COLUMNS // 2]
        spread = np.linspace(0, logits.shape[1] - 1, COLUMNS - len(likely)).astype(int)
        columns = np.union1d(likely, spread)
        cases.append(
            {
                "name": name,
                "tokens": ids,
                "argmax": logits.argmax(-1).tolist(),
                "gap": [_decimal(value, 4) for value in top[:, 1] - top[:, 0]],
                "positions": rows.tolist(),
                "ids": columns.tolist(),
                "logits": [
                    [_decimal(value, 9) for value in row] for row in logits[rows][:, columns]
                ],
            }
        )
    _write(GOLDEN / "logits.json", cases)


def _decimal(value: float, digits: int) -> float:
    # Nine digits determine a 32-bit float.
    return float(f"{value:.{digits}g}")


def _write(path: pathlib.Path, cases: list) -> None:
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(case, ensure_ascii=True, separators=(",", ":")) for case in cases)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{path.name}: {path.stat().st_size} bytes")


def main() -> None:
    """Reads the command line and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=pathlib.Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    path = parser.parse_args().gguf.resolve()

    llama_cpp = importlib.import_module("llama_cpp")
    vocabulary = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def tokenize(text: str) -> list[int]:
        return (
            vocabulary.tokenize(text.encode("utf-8"), add_bos=False, special=True) if text else []
        )

    write_tokens(tokenize)
    write_logits(tokenize, path)


if __name__ == "__main__":
    main()
