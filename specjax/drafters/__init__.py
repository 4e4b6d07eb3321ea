"""Ways to propose, one file each."""

from specjax.drafters.model import model
from specjax.drafters.prompt_lookup import prompt_lookup
from specjax.drafters.tree import tree
from specjax.drafters.union import union

__all__ = ["model", "prompt_lookup", "tree", "union"]
