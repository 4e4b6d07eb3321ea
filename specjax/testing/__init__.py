"""The conformance suite: hold your own models, drafters and rules to the contracts of `types`."""

from specjax.testing.decode import check_decoding
from specjax.testing.drafter import check_drafter
from specjax.testing.language_model import check_language_model
from specjax.testing.rule import check_rule

__all__ = ["check_decoding", "check_drafter", "check_language_model", "check_rule"]
