"""Pictures of acceptance and speed, in one style that reads on paper and on a dark page.

Each function takes plain numbers by name, draws on `axes` (of matplotlib, the extra `plots`; by
default a figure of its own) and returns them. Backgrounds are transparent, text and grid grey, and
methods keep colour and marker from picture to picture where their order is kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = [
    "acceptance_against_entropy",
    "acceptance_by_position",
    "predicted_against_measured",
    "save",
    "speedup_against",
    "speedup_against_acceptance",
    "speedup_by_domain",
]

# Okabe and Ito's colours that stand off both white and black.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_GREY = "#7F7F7F"
_LINE = {"linewidth": 1.6, "markersize": 5}

Estimate = Sequence[float | None]
"""An estimate with its interval: (estimate, low, high), of which the last two may be None."""


def acceptance_by_position(rates: Mapping[str, Sequence[Estimate]], axes: Any = None) -> Any:
    """Acceptance of the draft at each position, given that those before it were accepted.

    Args:
      rates: by method, an estimate with its interval a position from 1 on; None where nothing was
        tested.
      axes: as above.
    """
    axes = _axes(axes)
    longest = 1
    for index, (method, row) in enumerate(rates.items()):
        places = [place for place, rate in enumerate(row, start=1) if rate[0] is not None]
        found = [row[place - 1] for place in places]
        values = [rate[0] for rate in found]
        axes.errorbar(places, values, _bars(found), label=method, **_look(index), **_LINE)
        longest = max(longest, len(row))
    axes.set(xlabel="position in the draft", ylabel="acceptance rate", ylim=(0, 1.02))
    axes.set_xticks(range(1, longest + 1))
    return _finish(axes)


def speedup_by_domain(
    speedups: Mapping[str, Mapping[str, Estimate]],
    what: str = "speedup over plain decoding",
    axes: Any = None,
) -> Any:
    """Bars of speedup, methods side by side in every domain.

    Args:
      speedups: by method and domain, estimates with intervals.
      what: label of the axis.
      axes: as above.
    """
    domains = list(dict.fromkeys(domain for row in speedups.values() for domain in row))
    axes = _axes(axes, width=max(6.4, 1.1 + 1.15 * len(domains)))
    width = 0.8 / max(len(speedups), 1)
    for index, (method, row) in enumerate(speedups.items()):
        places = [i for i, domain in enumerate(domains) if domain in row]
        found = [row[domains[i]] for i in places]
        axes.bar(
            np.add(places, (index - (len(speedups) - 1) / 2) * width),
            [value[0] for value in found],
            0.92 * width,
            yerr=_bars(found),
            color=_COLOURS[index % len(_COLOURS)],
            error_kw={"ecolor": _GREY, "elinewidth": 1.0, "capsize": 2},
            label=method,
        )
    _even(axes)
    axes.set_xticks(range(len(domains)), [domain.replace("_", " ") for domain in domains])
    if len(domains) > 5:
        axes.tick_params(axis="x", labelrotation=25)
        for label in axes.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")
    axes.set(ylabel=what)
    return _finish(axes)


def acceptance_against_entropy(
    edges: Sequence[float],
    bins: Mapping[str, Sequence[Estimate]],
    of: str = "the target's law",
    axes: Any = None,
) -> Any:
    """Probability that a draft is accepted, by how open the next token is.

    Args:
      edges: of the bins, in nats, one more than there are bins.
      bins: by method, an estimate with its interval a bin; None where there was no place.
      of: whose entropy.
      axes: as above.
    """
    axes = _axes(axes)
    middles = (np.asarray(edges)[1:] + np.asarray(edges)[:-1]) / 2
    for index, (method, row) in enumerate(bins.items()):
        places = [place for place, value in enumerate(row) if value[0] is not None]
        found = [row[place] for place in places]
        values = [value[0] for value in found]
        axes.errorbar(middles[places], values, _bars(found), label=method, **_look(index), **_LINE)
    axes.set(xlabel=f"entropy of {of}, nats", ylabel="acceptance probability", ylim=(0, 1.02))
    return _finish(axes)


def speedup_against(
    what: str,
    speedups: Mapping[str, Mapping[float, Estimate]],
    label: str = "speedup over plain decoding",
    axes: Any = None,
) -> Any:
    """Lines of speedup against a batch size, a length of text or whatever else doubles.

    Args:
      what: label of the axis, such as `batch size`.
      speedups: by method and value, estimates with intervals. A value of 0, which no logarithm
        shows, stands one step left of the others.
      label: of the other axis.
      axes: as above.
    """
    axes = _axes(axes)
    values = sorted({value for row in speedups.values() for value in row})
    least = min((value for value in values if value > 0), default=1)
    place = {value: value if value > 0 else least / 2 for value in values}
    for index, (method, row) in enumerate(speedups.items()):
        found = [row[value] for value in sorted(row)]
        axes.errorbar(
            [place[value] for value in sorted(row)],
            [value[0] for value in found],
            _bars(found),
            label=method,
            capsize=2,
            **_look(index),
            **_LINE,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([place[value] for value in values], [f"{value:g}" for value in values])
    axes.minorticks_off()
    _even(axes)
    axes.set(xlabel=what, ylabel=label)
    return _finish(axes)


def speedup_against_acceptance(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    points: Mapping[str, Sequence[tuple[float, float]]],
    claims: Sequence[tuple[str, Sequence[float], Sequence[float]]] = (),
    axes: Any = None,
) -> Any:
    """What acceptance is worth: the cost model's curves, measured points, and what is quoted.

    Args:
      curves: by what they assume, acceptance rates and speedups.
      points: by method, pairs of measured acceptance rate and speedup.
      claims: names, acceptance from and to, speedup from and to; drawn as boxes.
      axes: as above.
    """
    axes = _axes(axes)
    styles = ("-", (0, (5, 2)), (0, (1, 1.5)))
    for index, (name, (rates, speedups)) in enumerate(curves.items()):
        style = styles[index % len(styles)]
        axes.plot(rates, speedups, color=_GREY, linewidth=1.4, linestyle=style, label=name)
    for name, (left, right), (low, high) in claims:
        left, right = (left - 0.006, right + 0.006) if left == right else (left, right)
        box = {"color": _GREY, "alpha": 0.16, "linewidth": 0}
        axes.fill_between([left, right], low, high, **box)
        # Above its box, or inside one that stands on the ground.
        side = "bottom" if low else "top"
        axes.annotate(name, (right, high), ha="right", va=side, fontsize=7, color=_GREY, zorder=4)
    for index, (method, row) in enumerate(points.items()):
        rates, speedups = np.asarray(row, float).reshape(-1, 2).T
        look = {**_look(index), "linestyle": "none"}
        axes.plot(rates, speedups, label=method, markersize=6, **look)
    _even(axes)
    axes.set(xlabel="acceptance rate", ylabel="speedup over plain decoding", xlim=(0, 1.02))
    # Curves rise steeply at the end, where nothing is.
    tops = [high for _, _, (_, high) in claims] + [s for row in points.values() for _, s in row]
    axes.set_ylim(0, 1.15 * max(tops, default=1.0) if tops else None)
    return _finish(axes)


def predicted_against_measured(
    points: Mapping[str, Sequence[tuple[float, float]]], within: float = 0.15, axes: Any = None
) -> Any:
    """What the cost model promised and what came.

    Args:
      points: by method, pairs of predicted and measured speedup.
      within: the band around equality that is shaded, as a share of what was measured.
      axes: as above.
    """
    axes = _axes(axes, width=5.0, height=4.6)
    every = [value for row in points.values() for pair in row for value in pair]
    low, high = 0.9 * min(every, default=1.0), 1.1 * max(every, default=1.0)
    line = np.array([low, high])
    band = {"color": _GREY, "alpha": 0.18, "linewidth": 0, "label": f"within {within:.0%}"}
    axes.fill_between(line, line / (1 + within), line / (1 - within), **band)
    axes.plot(line, line, color=_GREY, linewidth=1.0)
    for index, (method, row) in enumerate(points.items()):
        predicted, measured = np.asarray(row, float).reshape(-1, 2).T
        look = {**_look(index), "linestyle": "none"}
        axes.plot(predicted, measured, label=method, markersize=6, **look)
    axes.set(xlabel="predicted speedup", ylabel="measured speedup")
    axes.set(xlim=(low, high), ylim=(low, high))
    return _finish(axes)


def save(axes: Any, path: Any, heading: str = "") -> None:
    """Writes the figure of some axes, transparent, and closes it.

    Args:
      axes: of one of these pictures.
      path: of the file, whose ending says what kind.
      heading: written over the legend.
    """
    # An extra, and slow to import.
    from matplotlib import pyplot

    if heading and axes.get_legend() is not None:
        axes.get_legend().set_title(heading, {"size": 8})
        axes.get_legend().get_title().set_color(_GREY)
        axes.get_legend().set_alignment("left")
    axes.figure.savefig(path, dpi=160, transparent=True)
    pyplot.close(axes.figure)


def _axes(axes: Any, width: float = 6.4, height: float = 3.8) -> Any:
    if axes is not None:
        return axes
    from matplotlib import pyplot

    return pyplot.figure(figsize=(width, height), layout="constrained").add_subplot()


def _look(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
    }


def _bars(found: Sequence[Estimate]) -> np.ndarray:
    """Lengths below and above each estimate: [2, n]."""
    rows = []
    for estimate, low, high in found:
        assert estimate is not None
        rows.append(
            (0.0, 0.0) if low is None or high is None else (estimate - low, high - estimate)
        )
    return np.maximum(np.asarray(rows, float).reshape(-1, 2).T, 0)


def _even(axes: Any) -> None:
    """The line where a method neither gains nor loses."""
    axes.axhline(1.0, color=_GREY, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0.5)


def _finish(axes: Any) -> Any:
    """Greys that both pages carry, a light grid, and a legend where there is more than one name."""
    for place in ("top", "right"):
        axes.spines[place].set_visible(False)
    for place in ("left", "bottom"):
        axes.spines[place].set_color(_GREY)
    axes.tick_params(colors=_GREY, labelcolor=_GREY)
    for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
        label.set_color(_GREY)
    axes.grid(axis="y", color=_GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    names = axes.get_legend_handles_labels()[1]
    if names:
        # Above the axes, where it covers nothing; a letter takes some 0.07 inches.
        room = axes.figure.get_figwidth() / (0.07 * max(map(len, names)) + 0.5)
        axes.legend(
            frameon=False,
            labelcolor=_GREY,
            fontsize=8,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=min(max(int(room), 1), 4),
        )
    return axes
