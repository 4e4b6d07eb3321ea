"""The binaries about drafts, on a tiny target: from `distill` to `staleness`."""

import json

import numpy as np
import pytest

from experiments import (
    acceptance,
    distill,
    distill_config,
    distill_run,
    domains,
    generate,
    methods,
    objectives,
    staleness,
    stopping,
    targets,
    unseen_text,
)
from specjax.training import data, held_out, shards
from tests.cases import exhaustive

# Every width of a batch is a program; prompts as short as these make one.
NARROW = "--domains=passage,user_turn"
TINY = ("--model=tiny", "--batch=32", "--batch_tokens=512", NARROW)
SHORT = ("--tokens=4000", "--steps=30", "--copying_steps=4", "--max_new_tokens=40")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distill")


@pytest.fixture
def draft(call, folder):
    """A draft of the tiny target; made once."""
    path = folder / "draft.safetensors"
    if not path.exists():
        flags = [*TINY, *SHORT, f"--folder={folder}", f"--prompts={questions(folder)}", "--json"]
        code, _, errors = call(distill, *flags)
        assert code == 0, errors
    return path


def test_a_draft_comes_with_its_card_and_its_curve(draft, folder):
    card = json.loads(draft.with_suffix(".json").read_text())
    assert card["data"]["answer_tokens"] >= 4000
    assert card["training"]["copying"] == 0.1 and card["training"]["copying_steps"] == 4
    assert card["training"]["steps"] == 30 and card["training"]["minutes"] > 0
    assert 0 < card["held_out"]["overlap"] < 1 and 0 < card["coverage"] <= 1
    assert card["bytes"] == draft.stat().st_size < 16e6
    assert card["command"].startswith("python -m experiments.distill")
    assert card["acceptance"]["groups"].keys() == {"code", "translation", "overall"}
    assert card["stopping"]["cost"].keys() == {"draft", "passes", "overhead"}
    assert (folder / "training" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def cardless(draft, tmp_path):
    """The same draft, which nothing says learnt copying: smaller programs."""
    copy = tmp_path / "cardless.safetensors"
    copy.write_bytes(draft.read_bytes())
    return copy


def test_a_draft_that_cannot_be_written_leaves_the_one_before_with_its_card(
    call, draft, folder, monkeypatch
):
    before = [path.read_bytes() for path in (draft, draft.with_suffix(".json"))]

    def full(*_):
        raise ValueError("No space left on device")

    monkeypatch.setattr(distill_run.checkpoints.drafts, "write", full)
    code, _, errors = call(distill, *TINY, *SHORT, f"--folder={folder}")
    assert code == 2 and "No space left" in errors
    assert [path.read_bytes() for path in (draft, draft.with_suffix(".json"))] == before


def test_the_same_command_again_makes_nothing_anew(call, draft, folder):
    before = draft.read_bytes()
    code, output, errors = call(distill, *TINY, *SHORT, f"--folder={folder}")
    assert code == 0 and "held out" in output
    assert "step " not in errors and "shards" not in errors
    assert draft.read_bytes() == before
    shards = sorted((folder / "data").iterdir())
    code, _, errors = call(distill, *TINY, *SHORT, f"--folder={folder}", "--tokens=90000")
    assert code == 2 and "--tokens=90000" in errors and "what was trained in" in errors
    assert sorted((folder / "data").iterdir()) == shards


def test_candidates_are_chosen_by_their_cost(call, draft, folder):
    flags = [*TINY, *SHORT, f"--folder={folder}", "--choice_steps=5", "--json"]
    flags += ["--candidates=0/64/200", "--candidates=0+3/128/259", f"--out={folder / 'chosen'}"]
    # The draft of another shape is another run.
    (folder / "training").rename(folder / "first")
    code, output, _ = call(distill, *flags)
    assert code == 0
    card = json.loads(output.splitlines()[-1])
    first, second = card["candidates"]
    # Of c nothing is said: it is timed, and steps as small as these are all alike.
    assert first["bytes_per_step"] < second["bytes_per_step"]
    best = max(card["candidates"], key=lambda row: row["speedup"])
    assert card["shape"]["layers"] == best["layers"]
    # A killed run goes on with the same choice, whatever would be timed now.
    path = folder / "candidates" / "choice.json"
    kept = json.loads(path.read_text())
    kept["rows"][0]["speedup"] = kept["rows"][1]["speedup"] = 77.0
    path.write_text(json.dumps(kept))
    again = json.loads(call(distill, *flags)[1].splitlines()[-1])
    assert again["candidates"] == kept["rows"] and again["shape"] == card["shape"]
    code, _, errors = call(distill, *flags, "--rate=0.5")
    assert code == 2 and "candidates holds what was made with schedule=" in errors
    path.write_text("{}")
    code, _, errors = call(distill, *flags)
    assert code == 2 and "choice.json holds no choice" in errors


@pytest.mark.parametrize("length", ["3", "auto"])
def test_generate_decodes_with_it(call, draft, length, monkeypatch):
    monkeypatch.setattr(methods, "_LENGTHS", (1, 3))
    flags = ["--model=tiny", "--method=draft", f"--draft={draft}", f"--draft_length={length}"]
    flags += ["--compare", "--repeats=1", "--json", "--max_new_tokens=24", "--prompt=abc"]
    for more, identical in ((), True), (("--temperature=0.8",), None):
        code, output, errors = call(generate, *flags, *more)
        assert code == 0, errors
        report = json.loads(output.splitlines()[-1])
        assert report["identical"] is identical and report["certified"] is True


def questions(folder):
    path = folder / "questions.jsonl"
    lines = [
        {"question_id": i, "group": group, "turns": [f"{group} {i}"]}
        for group in ("code", "translation")
        for i in range(3)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_draft_stops_as_its_card_found_best(draft, tmp_path):
    bundle = targets.tiny()
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(draft.read_bytes())

    def made(**settings):
        drafter = methods.build("draft", bundle, methods.Settings(draft=str(copy), **settings))
        stops = (drafter.params.stop_below, drafter.params.stop_above)
        return drafter.nodes, *(None if stop is None else float(stop) for stop in stops)

    assert made() == (5, None, None)
    for below, above in ((None, None), (None, 1.5), (0.25, None)):
        best = {"length": 2, "stop_below": below, "stop_above": above}
        copy.with_suffix(".json").write_text(json.dumps({"stopping": {"best": best}}))
        assert made() == (2, below, above)
    # What is not asked for is the card's.
    assert made(draft_length=5) == (5, 0.25, None)
    assert made(stop="never") == (2, None, None)
    assert made(stop="entropy:2.5") == (2, None, 2.5)
    assert made(draft_length=3, stop="maximum:0.5") == (3, 0.5, None)
    # Records of a run are told apart by the line that they were made with.
    chosen = methods.resolved("draft", methods.Settings("auto", str(copy)))
    assert (chosen.draft_length, chosen.stop) == ("auto", "maximum:0.25")


def test_where_to_stop_is_chosen_anew(call, draft, cardless, folder):
    flags = [*TINY, "--max_new_tokens=40", f"--folder={folder / 'stopping'}", "--json"]
    code, _, errors = call(stopping, *flags, f"--draft={cardless}", "--tokens=1500")
    assert code == 2 and "has no card" in errors
    card = json.loads(draft.with_suffix(".json").read_text())
    # Nothing but where to stop is the chooser's.
    old = card | {"stopping": {"best": {"length": 77, "stop_below": None, "stop_above": None}}}
    cardless.with_suffix(".json").write_text(json.dumps(old | {"seed": 4}))
    code, output, errors = call(stopping, *flags, f"--draft={cardless}", "--tokens=1500")
    assert code == 0, errors
    found = json.loads(output.splitlines()[-1])
    made = json.loads(cardless.with_suffix(".json").read_text())
    kept = {name: found[name] for name in found.keys() - {"draft", "card"}}
    assert made == old | {"seed": 4, "stopping": kept}
    assert found["best"]["length"] in {row["length"] for row in found["never"]}
    text = json.loads((folder / "stopping" / "measured" / "data" / "settings.json").read_text())
    assert found["seed"] == text["seed"] == 5
    # Text of every domain at every temperature, though the first alone has tokens enough.
    held = data.read(folder / "stopping" / "measured" / "data", targets.tiny())
    assert found["domains"] == sorted({shard.domain for shard in held}) == ["passage", "user_turn"]
    assert [len(shard) for shard in held] == [8] * len(held)
    # All of it is measured on: nothing is held out of it, and small batches are batches too.
    greedy = [
        len(shard.text(row)[1])
        for shard in held
        for row, temperature in enumerate(shard.temperature)
        if temperature == 0
    ]
    assert found["tokens"] == sum(greedy) > 0
    settings = methods.resolved("draft", methods.Settings(draft=str(cardless)))
    assert settings.draft_length == found["best"]["length"]
    # `distill` keeps the choice if it makes this draft again; not of another, nor its own.
    assert distill_run._chosen_before(cardless, draft) == made["stopping"]
    assert distill_run._chosen_before(draft, draft) is None
    cardless.write_bytes(draft.read_bytes()[:-1])
    assert distill_run._chosen_before(cardless, draft) is None


@pytest.mark.parametrize("text", ["", "[]", '{"stopping": {"best": {"length": 3}}}', '{"a": 1}'])
def test_what_is_no_card_is_named(draft, tmp_path, text):
    copy = tmp_path / "other.safetensors"
    copy.write_bytes(draft.read_bytes())
    copy.with_suffix(".json").write_text(text)
    with pytest.raises(ValueError, match=r"other.json is no card.*--draft_length"):
        methods.build("draft", targets.tiny(), methods.Settings(draft=str(copy)))
    methods.build("draft", targets.tiny(), methods.Settings(3, str(copy), stop="never"))


def test_acceptance_by_group_resumes(call, draft, folder, tmp_path):
    flags = ["--model=tiny", f"--draft={draft}", "--max_new_tokens=16", "--batch=2", "--json"]
    flags += [
        "--draft_length=5",
        f"--prompts={questions(tmp_path)}",
        f"--out={tmp_path / 'records'}",
    ]
    code, output, errors = call(acceptance, *flags)
    assert code == 0, errors
    report = json.loads(output.splitlines()[-1])
    assert report["groups"].keys() == {"code", "translation", "overall"}
    assert report["groups"]["overall"]["prompts"] == 6
    assert all(1 <= row["tau"] <= 6 for row in report["groups"].values())
    lines = (tmp_path / "records").read_text().splitlines()
    (tmp_path / "records").write_text("\n".join(lines[:3]) + "\n")
    again = json.loads(call(acceptance, *flags)[1].splitlines()[-1])
    assert again["groups"] == report["groups"]
    # A kill may leave half a line; and a file may hold other prompts than those asked for.
    (tmp_path / "records").write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])
    assert json.loads(call(acceptance, *flags)[1].splitlines()[-1])["groups"] == report["groups"]
    fewer = json.loads(call(acceptance, *flags, "--count=1")[1].splitlines()[-1])
    assert fewer["groups"]["overall"]["prompts"] == 2
    # The counts of a batch are those of each prompt alone.
    alone = [flag for flag in flags if "batch" not in flag and "out" not in flag]
    one = json.loads(call(acceptance, *alone, "--batch=1")[1].splitlines()[-1])
    assert one["groups"] == report["groups"]


def test_domains_hold_cost_against_saving(call, draft, tmp_path):
    flags = ["--model=tiny", f"--draft={draft}", f"--folder={tmp_path}", "--batch=16", "--json"]
    flags += [f"--prompts={questions(tmp_path)}", "--tokens=1500", "--steps=10"]
    code, output, errors = call(domains, *flags, "--max_new_tokens=16", "--domains=code")
    assert code == 0, errors
    card = json.loads((tmp_path / "code" / "draft.json").read_text())
    # What the draft had learnt it goes on learning, or would forget it.
    assert card["training"]["copying"] == 0.1 and card["training"]["copying_steps"] == 0
    assert card["earlier"] == json.loads(draft.with_suffix(".json").read_text())
    report = json.loads(output.splitlines()[-1])
    assert report["groups"].keys() == {"generic", "code"}
    speedups = [report["predicted_speedup"][name]["code"] for name in ("generic", "code")]
    even = report["break_even_tokens"]["code"]
    assert (even is None) == (speedups[1] <= speedups[0])
    assert domains.break_even(1.0, 0.1, 1.0, 2.0) == pytest.approx(60 / (0.1 * 0.5))
    assert "code: " in domains.table(report) and "no prompt of" not in domains.table(report)
    unknown = domains.table({**report, "break_even_tokens": {}})
    assert "no prompt of the group code tells whether it pays" in unknown


# Of each kind one: a loss is a program for every width of batch.
FEW = ("forward_kl", "accepted_length", "total_variation, on-policy")


@pytest.mark.parametrize("names", [FEW, exhaustive(tuple(objectives.VARIANTS))])
def test_objectives_are_compared_from_one_beginning(
    call, draft, cardless, folder, names, monkeypatch
):
    chosen = {name: objectives.VARIANTS[name] for name in names}
    monkeypatch.setattr(objectives, "VARIANTS", chosen)
    flags = [*TINY, "--tokens=4000", "--max_new_tokens=40", f"--folder={folder}", "--json"]
    code, output, errors = call(objectives, *flags, f"--draft={cardless}", "--steps=8")
    assert code == 0, errors
    report = json.loads(output.splitlines()[-1])
    assert [row["loss"] for row in report["rows"]] == list(names)
    code, _, errors = call(objectives, *flags, f"--draft={cardless}", "--max_new_tokens=41")
    assert code == 2 and f"{folder / 'data'} holds what was made with max_new_tokens=40" in errors
    # Not one of them leaves the draft as it was, and no two of them take it to the same place.
    assert len({row["overlap"] for row in (report["before"], *report["rows"])}) == len(names) + 1
    held_out = json.loads(draft.with_suffix(".json").read_text())["held_out"]
    # The file holds it in bfloat16, and it is measured on other text.
    assert report["before"] == pytest.approx(held_out, abs=0.1)


def test_staleness_grows_with_the_divergence(call, cardless, tmp_path, monkeypatch):
    measured = []
    whole = held_out.measure

    def measure(objective, params, frozen, texts, length):
        found = whole(objective, params, frozen, texts, length)
        measured.append((unseen_text.told(texts), found))
        return found

    monkeypatch.setattr(held_out, "measure", measure)
    flags = ["--model=tiny", f"--draft={cardless}", f"--folder={tmp_path}", "--batch=16", "--json"]
    flags += ["--tokens=1500", "--steps=20", "--batch_tokens=512", "--strengths=4,16", NARROW]
    flags += ["--rows=2", "--window=64", "--target_rate=1e-3"]
    code, output, errors = call(staleness, *flags)
    assert code == 0, errors
    rows = json.loads(output.splitlines()[-1])["rows"]
    assert [row["updates"] for row in rows] == [0, 4, 16]
    assert 0 == rows[0]["kl"] < rows[1]["kl"] < rows[2]["kl"]
    for row in rows:
        # Both measures are of one text, that neither the draft nor its realignment has seen.
        made = tmp_path / f"after-{row['updates']}"
        seeds = [
            json.loads((made / part / "settings.json").read_text())["seed"]
            for part in ("data", "measured/data")
        ]
        assert seeds == [1, 2] and row["before"] != row["after"]
        assert (row["measured_on"], row["before"]) in measured
        assert (row["measured_on"], row["after"]) in measured
        held = [shards.read(path) for path in sorted((made / "measured/data").glob("shard-*"))]
        assert row["measured_on"]["tokens"] == sum(shard.answer_tokens for shard in held)
        greedy = [np.diff(shard.answer_offsets)[shard.temperature == 0].sum() for shard in held]
        assert row["measured_on"]["greedy_tokens"] == sum(greedy)
    assert (tmp_path / "staleness.png").read_bytes().startswith(b"\x89PNG")


def test_a_draft_of_another_shape_is_refused_before_anything_is_made(call, draft, tmp_path):
    flags = [*TINY, f"--folder={tmp_path / 'new'}", f"--start_from={draft}", "--layers=0"]
    code, _, errors = call(distill, *flags)
    assert code == 2 and "is of another shape" in errors and not (tmp_path / "new").exists()


def test_drafts_are_measured_on_text_of_no_seed_that_they_learnt_from(call, cardless, tmp_path):
    card = {"seed": 2, "earlier": {"seed": 7, "earlier": {"seed": 3, "earlier": None}}}
    cardless.with_suffix(".json").write_text(json.dumps(card))
    asked = distill_config.Config(str(tmp_path), start_from=str(cardless))
    assert unseen_text.seed(asked) == 8
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "settings.json").write_text('{"seed": 9}')
    assert unseen_text.seed(asked) == 10
    assert unseen_text.seed(distill_config.Config(str(tmp_path / "no"))) == 1
    for wrong in ({"seed": None}, {"earlier": 3}):
        cardless.with_suffix(".json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="cardless.*card"):
            unseen_text.seed(asked)


def test_a_draft_of_its_own_sizes_is_chosen_decodes_and_is_gone_on_with(call, draft, tmp_path):
    flags = [*TINY, "--tokens=4000", "--max_new_tokens=40", "--steps=6", "--json"]
    first = [*flags, f"--folder={tmp_path / 'first'}", "--candidates=2x32/48/200"]
    first += ["--choice_steps=4", "--copying_steps=3"]
    code, _, errors = call(distill, *first, "--export=x")
    assert code == 2 and "--export needs a draft of the target's layers" in errors
    code, output, errors = call(distill, *first)
    assert code == 0, errors
    card = json.loads(output.splitlines()[-1])
    assert card["shape"]["layers"] == {"num_layers": 2, "hidden_size": 32}
    assert card["candidates"][0]["layers"] == card["shape"]["layers"] and "2x32 " in errors
    assert card["training"]["features"] == 0 and card["training"]["copying"] == 0.1
    path = tmp_path / "first" / "draft.safetensors"
    report = ["--model=tiny", "--method=draft", f"--draft={path}", "--compare", "--repeats=1"]
    code, output, errors = call(generate, *report, "--max_new_tokens=16", "--prompt=a", "--json")
    assert code == 0 and json.loads(output.splitlines()[-1])["identical"], errors
    # Of as many layers, as wide as the target's, it is another draft all the same.
    then = [*flags, f"--folder={tmp_path / 'then'}", f"--start_from={path}", "--copying=0"]
    then += ["--feed_forward=48", "--draft_vocabulary=200"]
    code, _, errors = call(distill, *then)
    assert code == 2 and "of layers of its own; asked for" in errors
    code, output, errors = call(distill, *then, "--layers=2x32")
    assert code == 0, errors
    assert json.loads(output.splitlines()[-1])["earlier"]["shape"] == card["shape"]
    wide = [*flags, f"--folder={tmp_path / 'no'}", f"--start_from={draft}", "--layers=2x64"]
    code, _, errors = call(distill, *wide, "--feed_forward=128", "--draft_vocabulary=259")
    assert code == 2 and "of layers of the target; asked for" in errors
    assert not (tmp_path / "no").exists()


def test_a_draft_is_not_written_over_what_it_began_as(call, draft, tmp_path):
    before = draft.read_bytes()
    flags = [*TINY, *SHORT, f"--folder={tmp_path}", f"--start_from={draft}", f"--out={draft}"]
    code, _, errors = call(distill, *flags)
    assert code == 2 and "give another file" in errors and draft.read_bytes() == before
