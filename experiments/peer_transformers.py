"""A worker of `experiments.peers`: transformers on torch, by `generate` and its own options."""

import functools
import importlib
import time
from collections.abc import Mapping
from typing import Any

from experiments import peer_protocol

__all__ = ["METHODS", "Transformers"]

METHODS = {
    "plain": None,
    "prompt_lookup": "draft_length",
    "assisted": "draft_length",
    "early_exit": "layers",
}
# As its documentation has it: ten tokens, and four layers of sixteen.
_LOOKUP_TOKENS = 10
_EXIT_SHARE = 4


class _Clock:
    """A streamer: what came at which time, the prompt first."""

    def __init__(self):
        self.puts: list[tuple[float, list[int]]] = []

    def put(self, value: Any) -> None:
        """Called with token ids, after every step."""
        self.puts.append((time.perf_counter(), value.reshape(-1).tolist()))

    def end(self) -> None:
        """Called when all is done."""


class Transformers:
    """Greedy decoding by `generate`, in float32.

    Args:
      settings: `target`, a Hugging Face folder; `assistant`, that of a draft, for `assisted`;
        `threads`; and `ends`, the tokens that end an answer.
    """

    def __init__(self, settings: Mapping[str, Any]):
        # Not at the module's head: the worker tells that they are missing, and goes on.
        self._torch = torch = importlib.import_module("torch")
        self._library = importlib.import_module("transformers")
        torch.set_num_threads(settings["threads"])
        self._settings = settings
        self._target = self._load(settings["target"])
        self._assistant = functools.cache(self._load_assistant)
        self._depth = self._target.config.num_hidden_layers
        self._passes = 0
        self._target.register_forward_pre_hook(self._count)

    def decode(self, request: peer_protocol.Request) -> peer_protocol.Answer:
        """As `peer_protocol.Engine`."""
        options, ends = self._options(request.method), self._settings["ends"]
        tokens = self._torch.tensor([request.tokens])
        clock, self._passes = _Clock(), 0
        asked = time.perf_counter()
        self._target.generate(
            tokens,
            attention_mask=self._torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=(ends or [0])[0],
            streamer=clock,
            **options,
        )
        _, (began, first), *others = clock.puts
        return peer_protocol.Answer(
            new_tokens=[token for _, some in clock.puts[1:] for token in some],
            prefill_seconds=began - asked,
            prefill_tokens=len(first),
            seconds=(others[-1][0] if others else began) - began,
            target_steps=self._passes - 1,
        )

    def _options(self, method: str) -> dict[str, Any]:
        match peer_protocol.parse(method, METHODS):
            case "prompt_lookup", length:
                return {"prompt_lookup_num_tokens": length or _LOOKUP_TOKENS}
            case "assisted", length:
                return {"assistant_model": self._assistant(length)}
            case "early_exit", layers:
                layers = layers or max(self._depth // _EXIT_SHARE, 1)
                # Passes of the whole depth are counted as the target's.
                if layers >= self._depth:
                    raise ValueError(f"layers={layers} must be fewer than all {self._depth}")
                return {"assistant_early_exit": layers}
        return {}

    def _load_assistant(self, length: int | None) -> Any:
        model = self._load(self._settings["assistant"])
        if length is not None:
            own = model.generation_config
            own.num_assistant_tokens, own.num_assistant_tokens_schedule = length, "constant"
        return model

    def _load(self, folder: str) -> Any:
        model = self._library.AutoModelForCausalLM.from_pretrained(
            folder, dtype=self._torch.float32
        )
        return model.eval()

    def _count(self, model: Any, *arguments: Any) -> None:
        # An early exit drafts with the same model, made shallower for a while.
        self._passes += model.config.num_hidden_layers == self._depth


if __name__ == "__main__":
    peer_protocol.serve(Transformers)
