"""Exactness by enumeration; acceptance by replay and scoring, and what it is worth; pictures."""

from specjax.analysis import (
    cost_model,
    counts,
    entropy,
    intervals,
    plots,
    practice,
    replay,
    scoring,
    serving,
    tuning,
)
from specjax.analysis.acceptance import accepted_of, expected_accepted
from specjax.analysis.certificates import Certificate, certify, certify_many
from specjax.analysis.divergence import Divergence, first_divergence
from specjax.analysis.laws import random_law, warped_law
from specjax.analysis.outcomes import enumerated_law, outcome_law
from specjax.analysis.pictures import plot_tree, tree_text

__all__ = [
    "Certificate",
    "Divergence",
    "accepted_of",
    "certify",
    "certify_many",
    "cost_model",
    "counts",
    "entropy",
    "enumerated_law",
    "expected_accepted",
    "first_divergence",
    "intervals",
    "outcome_law",
    "plot_tree",
    "plots",
    "practice",
    "random_law",
    "replay",
    "scoring",
    "serving",
    "tree_text",
    "tuning",
    "warped_law",
]
