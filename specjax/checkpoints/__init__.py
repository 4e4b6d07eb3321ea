"""Reading checkpoints: GGUF files and Hugging Face folders, with their tokenizers."""

from specjax.checkpoints.fetch import FetchError
from specjax.checkpoints.loading import Bundle, layer_truncated, load
from specjax.checkpoints.tokenizer import TextStream, Tokenizer

__all__ = ["Bundle", "FetchError", "TextStream", "Tokenizer", "layer_truncated", "load"]
