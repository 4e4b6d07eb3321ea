"""Verification rules, one file each, and the resolve, walk and sampler they share."""

from specjax.verification import (
    block,
    coupled,
    k_seq,
    lossy,
    match,
    multi_candidate,
    token,
    traversal,
)
from specjax.verification.kernel import RefusedDraftError, check, children, judge, resolve, verify
from specjax.verification.rules import RULES, default_rule, get
from specjax.verification.survival import survival

__all__ = [
    "RULES",
    "RefusedDraftError",
    "block",
    "check",
    "children",
    "coupled",
    "default_rule",
    "get",
    "judge",
    "k_seq",
    "lossy",
    "match",
    "multi_candidate",
    "resolve",
    "survival",
    "token",
    "traversal",
    "verify",
]
