"""Ways to propose, one file each."""

from specjax.drafters.model import model
from specjax.drafters.prompt_lookup import prompt_lookup

__all__ = ["model", "prompt_lookup"]
