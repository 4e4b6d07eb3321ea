"""Verification rules, one file each, and the resolve, walk and sampler they share."""

from specjax.verification import block, match, token
from specjax.verification.kernel import check, children, resolve, verify
from specjax.verification.rules import RULES, default_rule, get

__all__ = [
    "RULES",
    "block",
    "check",
    "children",
    "default_rule",
    "get",
    "match",
    "resolve",
    "token",
    "verify",
]
