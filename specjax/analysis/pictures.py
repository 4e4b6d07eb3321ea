"""Draft trees to look at, with their acceptance: as text, and as a picture (extra `plots`)."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from specjax import trees

__all__ = ["plot_tree", "tree_text"]


def tree_text(
    tree: trees.Tree,
    labels: Sequence[str],
    accept: Sequence[float] | None = None,
    path: Collection[int] = (),
    root: str = "root",
) -> str:
    """The tree as lines of text, a node each.

    Args:
      tree: static.
      labels: of nodes 1…N, such as their tokens.
      accept: of nodes 1…N, the probability that each is accepted given that its parent was and its
        earlier siblings were not.
      path: accepted nodes, which are marked.
      root: label of the root.

    Raises:
      ValueError: a dynamic tree, or another number of labels or acceptances than N.
    """
    children = _children(tree, labels, accept)
    lines = [root]

    def grow(node, before):
        for child in children[node]:
            last = child == children[node][-1]
            share = "" if accept is None else f"{accept[child - 1]:.2f} "
            mark = "  ✓" if child in path else ""
            lines.append(f"{before}{'└─ ' if last else '├─ '}{share}{labels[child - 1]}{mark}")
            grow(child, before + ("   " if last else "│  "))

    grow(0, "")
    return "\n".join(lines)


def plot_tree(
    tree: trees.Tree,
    labels: Sequence[str],
    accept: Sequence[float] | None = None,
    path: Collection[int] = (),
    root: str = "root",
    axes: Any = None,
) -> Any:
    """Draws the tree from left to right; nodes are coloured by their acceptance.

    Args:
      tree, labels, accept, path, root: as in `tree_text`.
      axes: of matplotlib; by default a figure of its own.

    Returns:
      The axes.

    Raises:
      ValueError: as `tree_text`.
    """
    # An extra, and slow to import.
    from matplotlib import colormaps, pyplot

    children = _children(tree, labels, accept)
    depths = np.asarray(trees.depths(tree))[0]
    height = _heights(children)
    if axes is None:
        leaves = max(sum(not some for some in children), 2)
        size = (2.2 + 1.9 * tree.max_depth, 0.8 + 0.45 * leaves)
        axes = pyplot.figure(figsize=size, layout="constrained").add_subplot()
    taken = {0, *path}
    for node, some in enumerate(children):
        for child in some:
            both = node in taken and child in taken
            axes.plot(
                [depths[node], depths[child]],
                [height[node], height[child]],
                color="tab:green" if both else "lightgray",
                linewidth=2.5 if both else 1.0,
                zorder=1,
            )
    values = [np.nan, *(accept if accept is not None else [np.nan] * tree.size)]
    dots = axes.scatter(
        depths,
        height,
        c=values,
        vmin=0,
        vmax=1,
        cmap=colormaps["viridis"].with_extremes(bad="white"),
        plotnonfinite=True,
        s=60,
        zorder=2,
        edgecolors=["tab:green" if node in taken else "gray" for node in range(tree.size + 1)],
        linewidths=1.5,
    )
    for node, label in enumerate((root, *labels)):
        axes.annotate(
            label,
            (depths[node], height[node]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    if accept is not None:
        axes.figure.colorbar(dots, ax=axes, label="acceptance")
    axes.margins(x=0.12, y=0.2)
    axes.set_axis_off()
    return axes


def _children(tree, labels, accept) -> list[list[int]]:
    """The children of nodes 0…N."""
    if tree.static_parents is None:
        raise ValueError("a dynamic tree has a topology a row; draw trees.from_parents of one row")
    for name, given in (("labels", labels), ("accept", accept)):
        if given is not None and len(given) != tree.size:
            raise ValueError(f"{len(given)} {name} for a tree of N={tree.size} nodes")
    children: list[list[int]] = [[] for _ in range(tree.size + 1)]
    for child, parent in enumerate(tree.static_parents, start=1):
        children[parent].append(child)
    return children


def _heights(children: list[list[int]]) -> list[float]:
    """Leaves one below the other, parents in the middle of their children."""
    height = [0.0] * len(children)
    lowest = 0

    def place(node):
        nonlocal lowest
        for child in children[node]:
            place(child)
        if children[node]:
            height[node] = float(np.mean([height[child] for child in children[node]]))
        else:
            height[node] = float(-lowest)
            lowest += 1

    place(0)
    return height
