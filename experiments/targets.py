"""Targets by name: checkpoints, and one small enough to train drafts for within a minute."""

import jax
import jax.numpy as jnp
import tokenizers

import specjax
from experiments import binary
from specjax import checkpoints, models

__all__ = ["TINY", "load", "tiny"]

_SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TINY = models.TransformerConfig(
    vocab_size=256 + len(_SPECIAL),
    hidden_size=64,
    intermediate_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    context_length=2048,
)


def load(name: str, dtype: str = "float32") -> checkpoints.Bundle:
    """The target of a name: `tiny`, or anything that `specjax.load` takes, with its weights here.

    Raises:
      ValueError, RuntimeError, ImportError: as `specjax.load`.
    """
    with binary.Progress(f"loading {name}"):
        bundle = tiny(dtype) if name == "tiny" else specjax.load(name, dtype)
        jax.block_until_ready(bundle.target.params)
        return bundle


def tiny(dtype: jax.typing.DTypeLike = jnp.float32) -> checkpoints.Bundle:
    """Random weights, bytes as tokens; the same every time."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: index for index, letter in enumerate(alphabet)}, [])
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(list(_SPECIAL))
    tokenizer = checkpoints.Tokenizer(inner, eos_ids=[len(alphabet)], chat_template=_TEMPLATE)
    # Sharper than usual, or its texts would hardly follow from anything.
    params = models.init_params(TINY, jax.random.key(0), 2.0)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    return checkpoints.assemble("tiny", TINY, params, tokenizer)
