"""Decoding loops: plain and speculative, streaming, ragged batches, going on from a result."""

from specjax.decoding.generation import (
    TokenStream,
    autoregressive,
    decode,
    first_draft,
    generate,
    rule_for,
    stream,
)
from specjax.decoding.plain import NOTHING
from specjax.decoding.speculative import run, step
from specjax.decoding.start import init
from specjax.decoding.state import (
    DecodeResult,
    DecodeState,
    FinishReason,
    Request,
    Statistics,
    StepInfo,
    no_statistics,
    record,
)

__all__ = [
    "NOTHING",
    "DecodeResult",
    "DecodeState",
    "FinishReason",
    "Request",
    "Statistics",
    "StepInfo",
    "TokenStream",
    "autoregressive",
    "decode",
    "first_draft",
    "generate",
    "init",
    "no_statistics",
    "record",
    "rule_for",
    "run",
    "step",
    "stream",
]
