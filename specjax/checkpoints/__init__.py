"""Reading checkpoints (GGUF files, Hugging Face folders, drafts), with their tokenizers."""

from specjax.checkpoints import drafts
from specjax.checkpoints.fetch import FetchError
from specjax.checkpoints.loading import Bundle, assemble, layer_truncated, load
from specjax.checkpoints.tokenizer import TextStream, Tokenizer

__all__ = [
    "Bundle",
    "FetchError",
    "TextStream",
    "Tokenizer",
    "assemble",
    "drafts",
    "layer_truncated",
    "load",
]
