"""Pictures show the numbers that they were given, in one look on either page."""

import numpy as np
import pytest

from specjax.analysis import entropy, plots

pytest.importorskip("matplotlib").use("agg")
pyplot = pytest.importorskip("matplotlib.pyplot")

ONE, OTHER = (1.5, 1.2, 1.9), (0.8, None, None)


@pytest.fixture(autouse=True)
def closed():
    yield
    pyplot.close("all")


def points_of(axes):
    """By label, what every line or row of markers goes through."""
    handles, labels = axes.get_legend_handles_labels()
    found = {}
    for handle, label in zip(handles, labels, strict=True):
        line = handle[0] if isinstance(handle, tuple) else handle
        # A band has no points.
        if not hasattr(line, "get_xydata"):
            continue
        found[label] = np.asarray(line.get_xydata()).tolist()
    return found


def test_by_position():
    rates = {"a": [(0.8, 0.7, 0.9), (0.5, None, None)], "b": [(None, None, None), (0.4, 0.2, 0.6)]}
    axes = plots.acceptance_by_position(rates)
    assert points_of(axes) == {"a": [[1, 0.8], [2, 0.5]], "b": [[2, 0.4]]}
    assert list(axes.get_xticks()) == [1, 2]


def test_by_domain():
    axes = plots.speedup_by_domain({"a": {"code": ONE, "chat": OTHER}, "b": {"chat": ONE}})
    heights = [[bar.get_height() for bar in bars.patches] for bars in axes.containers[1::2]]
    assert heights == [[1.5, 0.8], [1.5]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["code", "chat"]
    # The second method's bar stands at the second domain, beside the first's.
    first, second = axes.containers[1].patches[1], axes.containers[3].patches[0]
    assert 0 < second.get_x() - first.get_x() < 1


def test_by_entropy():
    counts, sums = entropy.binned([0.05, 0.05, 9.0, 20.0, 1.0], [1.0, 0.5, 0.2, 0.4, np.nan])
    assert (sum(counts), counts[0], counts[-1]) == (4, 2, 2)
    assert (sums[0], sums[-1]) == (1.5, pytest.approx(0.6))
    bins = [(0.75, 0.5, 1.0), *[(None, None, None)] * (len(counts) - 2), (0.3, None, None)]
    axes = plots.acceptance_against_entropy(entropy.EDGES, {"a": bins})
    np.testing.assert_allclose(points_of(axes)["a"], [[0.05, 0.75], [9.0, 0.3]])


def test_against_what_doubles():
    axes = plots.speedup_against("batch size", {"a": {4: OTHER, 1: ONE}})
    assert points_of(axes)["a"] == [[1, 1.5], [4, 0.8]]
    assert axes.get_xlabel() == "batch size"
    # What no logarithm shows stands left of all else, under its own name.
    axes = plots.speedup_against("context", {"a": {0: ONE, 1024: OTHER, 4096: ONE}})
    assert [x for x, _ in points_of(axes)["a"]] == [512, 1024, 4096]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1024", "4096"]


def test_against_acceptance():
    claims = [("claimed", (0.8, 0.8), (3.0, 4.0))]
    axes = plots.speedup_against_acceptance(
        {"v = 1": ([0.0, 1.0], [1, 2])}, {"a": [(0.7, 1.4)]}, claims
    )
    assert points_of(axes) == {"v = 1": [[0, 1], [1, 2]], "a": [[0.7, 1.4]]}
    assert "claimed" in [text.get_text() for text in axes.texts]


def test_predicted_against_measured(tmp_path):
    axes = plots.predicted_against_measured({"a": [(1.2, 1.5)], "b": []})
    assert points_of(axes) == {"a": [[1.2, 1.5]], "b": []}
    plots.save(axes, tmp_path / "picture.png", "a heading")
    picture = pyplot.imread(tmp_path / "picture.png")
    assert axes.get_legend().get_title().get_text() == "a heading"
    # Transparent, and with no ink so dark or so light that one of the pages swallows it.
    ink = picture[..., 3] > 0.9
    brightness = picture[..., :3].mean(axis=-1)[ink]
    assert picture[0, 0, 3] == 0 and brightness.min() > 0.15 and brightness.max() < 0.85


def test_colours_follow_the_order_of_methods():
    first = plots.acceptance_by_position({name: [ONE] for name in "abc"})
    second = plots.speedup_against("x", {name: {1: ONE, 2: ONE} for name in "abc"})

    def colours(axes):
        return [handle[0].get_color() for handle in axes.get_legend_handles_labels()[0]]

    assert colours(first) == colours(second) and len(set(colours(first))) == 3
