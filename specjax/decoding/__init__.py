"""Decoding loops: plain and speculative, streaming, ragged batches, going on from a result."""

from specjax.decoding.automatic import (
    AutomaticStream,
    Cost,
    best_length,
    decode_automatically,
    generate_automatically,
)
from specjax.decoding.generation import (
    TokenStream,
    advance,
    autoregressive,
    decode,
    first_draft,
    form_of,
    generate,
    rule_for,
    stream,
)
from specjax.decoding.plain import NOTHING
from specjax.decoding.speculative import pass_widths, run, step
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
    "AutomaticStream",
    "Cost",
    "DecodeResult",
    "DecodeState",
    "FinishReason",
    "Request",
    "Statistics",
    "StepInfo",
    "TokenStream",
    "advance",
    "autoregressive",
    "best_length",
    "decode",
    "decode_automatically",
    "first_draft",
    "form_of",
    "generate",
    "generate_automatically",
    "init",
    "no_statistics",
    "pass_widths",
    "record",
    "rule_for",
    "run",
    "step",
    "stream",
]
