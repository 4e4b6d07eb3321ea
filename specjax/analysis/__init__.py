"""Exactness by enumeration, and where two decodes part."""

from specjax.analysis.divergence import Divergence, first_divergence
from specjax.analysis.exactness import (
    Certificate,
    certify,
    enumerated_law,
    outcome_law,
    random_law,
)

__all__ = [
    "Certificate",
    "Divergence",
    "certify",
    "enumerated_law",
    "first_divergence",
    "outcome_law",
    "random_law",
]
