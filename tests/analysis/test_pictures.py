"""Trees as text and as pictures."""

import jax.numpy as jnp
import matplotlib
import pytest

from specjax import analysis, trees

matplotlib.use("agg")
TREE = trees.from_parents([0, 0, 1, 1, 3])
LABELS = ["the", "a", "cat", "dog", "sat"]


def test_text():
    accept = [0.5, 0.25, 1.0, 0.0, 0.75]
    assert analysis.tree_text(TREE, LABELS, accept, path=(1, 3), root="…") == "\n".join(
        [
            "…",
            "├─ 0.50 the  ✓",
            "│  ├─ 1.00 cat  ✓",
            "│  │  └─ 0.75 sat",
            "│  └─ 0.00 dog",
            "└─ 0.25 a",
        ]
    )
    assert analysis.tree_text(trees.chain(1), ["x"]) == "root\n└─ x"


def test_picture(tmp_path):
    axes = analysis.plot_tree(TREE, LABELS, [0.5, 0.25, 1.0, 0.0, 0.75], path=(1, 3))
    assert len(axes.lines) == 5 and {text.get_text() for text in axes.texts} == {"root", *LABELS}
    axes.figure.savefig(tmp_path / "tree.png")
    assert analysis.plot_tree(trees.chain(2), ["x", "y"], axes=axes) is axes


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="2 labels for a tree of N=5"):
        analysis.tree_text(TREE, ["x", "y"])
    with pytest.raises(ValueError, match="dynamic"):
        analysis.tree_text(trees.dynamic(jnp.zeros((1, 1), jnp.int32), 1), ["x"])
