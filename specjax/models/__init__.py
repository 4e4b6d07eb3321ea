"""Language models: the Llama line's transformer, and tabular and recurrent toys."""

from specjax.models.config import RotaryScaling, TransformerConfig
from specjax.models.recurrent import recurrent_model
from specjax.models.reduced import reduced_vocabulary
from specjax.models.tabular import random_table, tabular_model
from specjax.models.transformer import init_params, language_model, parameter_shapes

__all__ = [
    "RotaryScaling",
    "TransformerConfig",
    "init_params",
    "language_model",
    "parameter_shapes",
    "random_table",
    "recurrent_model",
    "reduced_vocabulary",
    "tabular_model",
]
