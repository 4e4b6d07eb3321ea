"""A worker of `experiments.peers`: specjax's own methods, by their names."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax

from experiments import compilation, methods, peer_protocol, process, targets
from specjax import decoding, native

__all__ = ["Specjax"]


class Specjax:
    """Greedy decoding by the methods of `experiments.methods`, batch 1.

    Args:
      settings: `model`; `draft`, the file for methods that take one and name none, or None;
        `compilation_cache`, as the flag.
    """

    def __init__(self, settings: Mapping[str, Any]):
        process.keep_memory()
        compilation.keep_programs(settings["compilation_cache"])
        native.available()
        self._draft = settings["draft"]
        self._bundle = targets.load(settings["model"])
        self._decoders: dict[str, methods.Decoder] = {}

    def decode(self, request: peer_protocol.Request) -> peer_protocol.Answer:
        """As `peer_protocol.Engine`."""
        decoder, prompts = self._decoder(request.method), [request.tokens]
        options: dict[str, Any] = {"max_new_tokens": request.max_new_tokens}
        # Where lengths are chosen on the way, a run need not meet them all.
        decoder.warm(prompts, options)
        asked = time.perf_counter()
        begun, state = decoding.init(decoder.target, decoder.drafter, prompts, **options)
        jax.block_until_ready(state)
        began = time.perf_counter()
        result = decoder.decode(begun, state)
        jax.block_until_ready(result.tokens)
        ended = time.perf_counter()
        return peer_protocol.Answer(
            new_tokens=result.new_tokens[0],
            prefill_seconds=began - asked,
            prefill_tokens=0,
            seconds=ended - began,
            target_steps=int(result.statistics.target_steps[0]),
        )

    def _decoder(self, method: str) -> methods.Decoder:
        if method not in self._decoders:
            asked = methods.parse(method)
            if asked.name in methods.OF_A_FILE and asked.settings.draft is None:
                settings = dataclasses.replace(asked.settings, draft=self._draft)
                asked = dataclasses.replace(asked, settings=settings)
            self._decoders[method] = asked.decoder(self._bundle)
        return self._decoders[method]


if __name__ == "__main__":
    peer_protocol.serve(Specjax)
