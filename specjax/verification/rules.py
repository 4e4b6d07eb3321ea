"""The rules by name, and the one a draft gets when none is asked for."""

from specjax import types
from specjax.verification import block, coupled, k_seq, match, multi_candidate, token, traversal

__all__ = ["RULES", "default_rule", "get"]

RULES: dict[str, types.VerificationRule] = {
    rule.name: rule
    for rule in (
        match.rule,
        coupled.rule,
        token.rule,
        block.rule,
        multi_candidate.rule,
        k_seq.rule,
        traversal.rule,
    )
}


def get(rule: str | types.VerificationRule) -> types.VerificationRule:
    """A rule by its name, or the rule itself.

    Raises:
      ValueError: no rule has this name.
    """
    if isinstance(rule, types.VerificationRule):
        return rule
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(sorted(RULES))}")
    return RULES[rule]


def default_rule(draft: types.Draft) -> types.VerificationRule:
    """`match` for deterministic drafts, `block` for sampled chains, `multi_candidate` for trees.

    Reads only what is static in the draft.
    """
    if draft.is_deterministic or draft.siblings == "coupled":
        return match.rule
    return block.rule if draft.tree.is_chain else multi_candidate.rule
