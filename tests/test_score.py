"""The binary that scores logs: its report against decodes, what it resumes, and what it refuses."""

import json

import jax
import numpy as np
import pytest

import specjax
from experiments import logs, methods, score, targets
from specjax import checkpoints, drafters, types

QUESTIONS = ["red green red green", "What is a river?", "abcabcabc", "To be or not to be"]
GROUPS = ["copies", "questions", "copies", "questions"]


@pytest.fixture(scope="module")
def bundle():
    return targets.tiny()


@pytest.fixture(scope="module")
def prompts(bundle):
    return [bundle.chat(question) for question in QUESTIONS]


def written(bundle, prompts, temperature, drafter=specjax.decoding.NOTHING, **options):
    return specjax.generate(
        bundle.target,
        drafter,
        prompts,
        key=jax.random.key(1),
        sampling=types.Sampling(temperature),
        max_new_tokens=24,
        # Bytes that some of the answers hold.
        eos=(bundle.tokenizer.eos_ids[0], 189),
        **options,
    )


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return f"--log={path}"


@pytest.fixture(scope="module")
def log(bundle, prompts, tmp_path_factory):
    """The same prompts in every form that a line may have."""
    result = written(bundle, prompts, 0.0)
    said = [
        {"prompt": QUESTIONS[0]},
        {"turns": [QUESTIONS[1], "And then?"]},
        {"messages": [{"role": "user", "content": QUESTIONS[2]}]},
        {"prompt": prompts[3]},
    ]
    lines = [
        {**prompt, "answer": answer, "group": group}
        for prompt, answer, group in zip(said, result.new_tokens, GROUPS, strict=True)
    ]
    return write(tmp_path_factory.mktemp("logs") / "greedy.jsonl", lines)


def report_of(ended):
    code, output, errors = ended
    assert code == 0, errors
    return json.loads(output.splitlines()[-1])


MODEL = ("--model=tiny", "--json", "--method=model", "--draft=layers:3", "--draft_length=3")
LOOKUP = ("--model=tiny", "--json", "--method=prompt_lookup", "--draft_length=3")


@pytest.mark.parametrize("flags", [MODEL, LOOKUP], ids=["model", "prompt_lookup"])
def test_a_greedy_log_tells_what_decoding_counts(call, bundle, prompts, log, flags):
    report = report_of(call(score, *flags, log))
    settings = methods.Settings(3, "layers:3" if flags is MODEL else None)
    drafter = methods.build(report["method"], bundle, settings)
    result = written(bundle, prompts, 0.0, drafter)
    counts = jax.tree.map(np.asarray, result.statistics)
    assert report["groups"].keys() == {*GROUPS, "overall"}
    for name, row in report["groups"].items():
        here = np.asarray([name in (group, "overall") for group in GROUPS])
        assert row["texts"] == here.sum() and row["tokens"] == counts.emitted[here].sum()
        assert row["improbable"] == 0
        wanted = counts.emitted[here].sum() / counts.target_steps[here].sum()
        assert row["tau"][0] == pytest.approx(wanted, abs=1e-12)
        tested, accepted = (x[here].sum(axis=0) for x in (counts.tested, counts.accepted))
        if tested.sum():
            rate = row["acceptance_rate"][0]
            assert rate == pytest.approx(accepted.sum() / tested.sum(), abs=1e-12)
        for found, above, below in zip(
            row["acceptance_by_position"], accepted, tested, strict=True
        ):
            assert found[0] == (pytest.approx(above / below) if below else None)
    if flags is MODEL:
        row = report["groups"]["overall"]
        assert row["places"] == row["tokens"] and row["overlap"][0] > 0
        # Four texts are too few for an interval.
        assert row["overlap"][1:] == [None, None]
        assert row["entropy_target"] > 1 and row["entropy_draft"] > 1


def test_a_drawn_log_by_rule(call, bundle, prompts, tmp_path, monkeypatch):
    answers = written(bundle, prompts, 0.9).new_tokens
    lines = [
        {"prompt": prompt, "answer": answer}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    flags = (*MODEL, write(tmp_path / "drawn.jsonl", lines))
    rows = {
        rule: report_of(call(score, *flags, "--temperature=0.9", f"--rule={rule}"))["groups"]
        for rule in ("token", "block", "match")
    }
    assert rows["token"].keys() == {"drawn", "overall"}
    taus = {rule: row["overall"]["tau"][0] for rule, row in rows.items()}
    assert 1 < taus["match"] < taus["token"] <= taus["block"]
    assert len({row["overall"]["overlap"][0] for row in rows.values()}) == 1
    assert rows["token"]["overall"]["improbable"] == 0
    # The wrong temperature is told from the text; drafts are then held against it all the same.
    code, output, errors = call(score, *(flag for flag in flags if flag != "--json"))
    assert code == 0, errors
    assert "the target gives no probability to" in output
    # Of a tree that is drawn the first draft alone is known.
    bush = methods.Method(
        "a tree",
        lambda bundle, settings: drafters.tree(checkpoints.layer_truncated(bundle, 3), (2, 1)),
    )
    monkeypatch.setitem(methods.METHODS, "bush", bush)
    tree = ("--model=tiny", "--method=bush", flags[-1])
    row = report_of(call(score, *tree, "--temperature=0.9", "--json"))["groups"]["overall"]
    assert row["overlap"] == rows["token"]["overall"]["overlap"] and "tau" not in row
    code, output, _ = call(score, *tree, "--temperature=0.9")
    (line,) = (line for line in output.splitlines() if line.startswith("overall"))
    assert code == 0 and line.split()[3:5] == ["–", "–"]
    assert report_of(call(score, *tree, "--json"))["groups"]["overall"]["tau"][0] >= 1


def test_pictures_and_acceptance_by_entropy(call, log, tmp_path):
    pytest.importorskip("matplotlib")
    report = report_of(call(score, *MODEL, log, f"--plots={tmp_path}", "--json"))
    overall = report["groups"]["overall"]
    laws = {"target", "draft"}
    assert overall["by_entropy"].keys() == laws
    wanted = {"acceptance_by_position", *(f"acceptance_by_entropy_of_{law}" for law in laws)}
    assert {path.stem for path in tmp_path.glob("*.png")} == wanted


def test_a_run_goes_on(call, log, tmp_path):
    out = tmp_path / "records.jsonl"
    flags = (*MODEL, log, f"--out={out}")
    report = report_of(call(score, *flags))
    lines = out.read_text().splitlines()
    assert len(lines) == 5
    # A kill leaves half a line; what was whole is not scored again, and is believed.
    record = json.loads(lines[1])
    told = json.dumps(record | {"target_steps": record["target_steps"] / 2})
    out.write_text("\n".join([lines[0], told, lines[2], lines[3][:20]]))
    again = report_of(call(score, *flags))
    assert again["groups"]["overall"]["tau"] != report["groups"]["overall"]["tau"]
    assert again["groups"]["overall"]["texts"] == 4
    # A file may hold other texts than those asked for.
    out.write_text("\n".join(lines) + "\n")
    fewer = report_of(call(score, *flags, "--count=1"))
    assert fewer["groups"]["overall"]["texts"] == 2
    assert len(out.read_text().splitlines()) == 5
    code, _, errors = call(score, *flags, "--temperature=0.5")
    assert code == 2 and "its temperature is 0.0" in errors.splitlines()[-1]
    assert report_of(call(score, *flags, log))["groups"] == report["groups"]


def test_texts_that_are_too_long_are_left_out(call, log):
    report = report_of(call(score, *LOOKUP, log, "--longest_prompt=19"))
    assert report["left_out"] == 2 and report["groups"]["overall"]["texts"] == 2
    code, _, errors = call(score, *LOOKUP, log, "--longest_prompt=1")
    assert code == 2 and "all 4 texts" in errors.splitlines()[-1]


# Lines.


def test_what_a_line_may_hold(bundle, tmp_path):
    end = bundle.tokenizer.eos_ids[0]
    # A text may hold what others take for the end of a line.
    answer = "a\u2028b"
    ids = bundle.tokenizer.encode(answer)
    lines = [
        {"prompt": "?", "answer": answer},
        {"prompt": "?", "answer": answer, "finish_reason": "stop"},
        {"prompt": "?", "answer": [*ids, end], "finish_reason": "eos", "category": "x"},
        {"prompt": "?", "answer": ids, "finish_reason": "length", "group": "y"},
        {"prompt": "?", "answer": "", "finish_reason": "stop"},
        # The same may be asked and answered twice.
        {"prompt": "?", "answer": answer},
    ]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    pairs = logs.read(str(path), str(path))
    assert [pair.group for pair in pairs] == ["lines", "lines", "x", "y", "lines", "lines"]
    found = [pair.tokens(bundle) for pair in pairs]
    assert [answer for _, answer in found] == [ids, [*ids, end], [*ids, end], ids, [end], ids]
    assert all(prompt == bundle.chat("?") for prompt, _ in found)
    assert len({pair.key for pair in pairs}) == 6


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a", "answer"', "line 2: Expecting"),
        ("[1]", "line 2: [1] is no object"),
        ("", "line 2: Expecting value"),
        ('{"answer": "b"}', "line 2, prompt: None must be a text"),
        ('{"prompt": [], "answer": "b"}', "line 2, prompt: []"),
        ('{"prompt": [1.5], "answer": "b"}', "line 2, prompt: [1.5]"),
        ('{"prompt": "a"}', "line 2, answer: None must be a text"),
        ('{"prompt": "a", "answer": ""}', "line 2, answer: '' must be"),
        ('{"prompt": "a", "answer": [true]}', "line 2, answer: [True]"),
        ('{"turns": "a", "answer": "b"}', "line 2, turns: 'a' must be a list of texts"),
        ('{"messages": [], "answer": "b"}', "line 2, messages: []"),
        ('{"messages": [{"role": "user"}], "answer": "b"}', "line 2, messages: message 0"),
        ('{"prompt": "a", "answer": "b", "group": 3}', "line 2, group: 3 must be a text"),
        ('{"prompt": "a", "answer": "b", "finish_reason": 3}', "line 2, finish_reason: 3"),
        ('{"prompt": [999], "answer": "b"}', "line 2, prompt: token id 999"),
        ('{"prompt": "a", "answer": [999]}', "line 2, answer: token id 999"),
    ],
)
def test_a_line_that_is_none_is_named(call, tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n\n"[: 1 + (not line)])
    code, output, errors = call(score, *LOOKUP, f"--log={path}")
    assert (code, output) == (2, "")
    assert message in errors.splitlines()[-1] and str(path) in errors.splitlines()[-1]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "give --log"),
        (["--log=/nowhere"], "--log=/nowhere cannot be read"),
        (["--log=/dev/null"], "--log=/dev/null is empty"),
        (["--method=guess"], "unknown method 'guess'"),
        (["--method=plain"], "--method=plain drafts nothing"),
        (["--count=0"], "--count=0"),
        (["--temperature=-1"], "-1"),
        (["--draft_length=auto"], "--draft_length='auto'"),
        (["--method=prompt_lookup", "--draft=x"], "draft=x means nothing"),
        (["--max_new_tokens=3"], "--max_new_tokens means nothing"),
    ],
)
def test_bad_input_is_one_line(call, flags, message):
    code, output, errors = call(score, "--model=tiny", *flags)
    assert (code, output) == (2, "")
    assert message in errors.splitlines()[-1] and errors.splitlines()[-1].startswith("error:")


@pytest.mark.parametrize(
    "flags, message",
    [
        ((*LOOKUP, "--rule=token"), "'token'"),
        ((*MODEL, "--rule=k_seq", "--temperature=1"), "'k_seq' cannot be estimated"),
    ],
)
def test_rules_that_cannot_be_told(call, log, flags, message):
    code, _, errors = call(score, *flags, log)
    assert code == 2 and message in errors.splitlines()[-1]
