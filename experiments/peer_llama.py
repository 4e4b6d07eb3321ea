"""A worker of `experiments.peers`: llama.cpp, through the loop of llama-cpp-python."""

import functools
import importlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import peer_protocol

__all__ = ["METHODS", "LlamaCpp"]

METHODS = {"plain": None, "prompt_lookup": "draft_length"}
# GGML_TYPE_F32.
_FLOAT32 = 0


class LlamaCpp:
    """Greedy decoding by `Llama.generate`, with weights and cache in float32.

    Args:
      settings: `target`, a GGUF file; `capacity`, the longest text; `threads`; and `ends`, the
        tokens that end an answer.
    """

    def __init__(self, settings: Mapping[str, Any]):
        # Not at the module's head: the worker tells that it is missing.
        self._library = importlib.import_module("llama_cpp")
        self._speculative = importlib.import_module("llama_cpp.llama_speculative")
        self._settings = settings
        self._loaded = functools.cache(self._load)
        self._loaded("plain")

    def decode(self, request: peer_protocol.Request) -> peer_protocol.Answer:
        """As `peer_protocol.Engine`."""
        llama, passes = self._loaded(request.method)
        # Or it would not run what the last prompt began with.
        llama.reset()
        passes.clear()
        tokens: list[int] = []
        prefill, asked = 0, time.perf_counter()
        began = asked
        for token in llama.generate(request.tokens, temp=0.0):
            tokens.append(token)
            if len(tokens) == 1:
                began, prefill = time.perf_counter(), len(passes)
            if token in self._settings["ends"] or len(tokens) == request.max_new_tokens:
                break
        ended = time.perf_counter()
        return peer_protocol.Answer(
            new_tokens=tokens,
            prefill_seconds=began - asked,
            prefill_tokens=1,
            seconds=ended - began,
            target_steps=len(passes) - prefill,
        )

    def _load(self, method: str) -> tuple[Any, list[int]]:
        """The model with a context of the method's, and a list of the tokens of every pass."""
        name, length = peer_protocol.parse(method, METHODS)
        drafted = {} if length is None else {"num_pred_tokens": length}
        lookup = self._speculative.LlamaPromptLookupDecoding(**drafted)
        llama = self._library.Llama(
            self._settings["target"],
            n_ctx=self._settings["capacity"],
            n_threads=self._settings["threads"],
            n_threads_batch=self._settings["threads"],
            type_k=_FLOAT32,
            type_v=_FLOAT32,
            # Its drafts need logits everywhere, for which it makes no room by itself.
            logits_all=name == "prompt_lookup",
            draft_model=lookup if name == "prompt_lookup" else None,
            verbose=False,
        )
        passes: list[int] = []
        evaluate = llama.eval

        def counted(tokens: Sequence[int]) -> None:
            passes.append(len(tokens))
            evaluate(tokens)

        llama.eval = counted
        return llama, passes


if __name__ == "__main__":
    peer_protocol.serve(LlamaCpp)
