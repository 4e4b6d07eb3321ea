"""The kind of drafts that a rule is made for."""

RATIO = ["block", "k_seq", "multi_candidate", "token", "traversal"]
ON_TREES = ["k_seq", "multi_candidate", "traversal"]


def siblings(rule):
    """What a chain's siblings must be for a rule, by its name."""
    return "coupled" if rule == "coupled" else "independent"
