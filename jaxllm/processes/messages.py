"""What steps are given, as messages between processes: batches of arrays, by the names of their kinds."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxllm.decoder.batch import PackedBatch, TokenBatch
from jaxllm.execution.batch import DecodeBatch, DecodeRows, ListedPenalties, SamplingBatch, SamplingFilters

_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (TokenBatch, PackedBatch, DecodeBatch, DecodeRows, SamplingBatch, SamplingFilters, ListedPenalties)
}


def encoded(value: Any) -> Any:
    """Plain values, arrays, and tuples of them, of which those of a kind keep its name."""
    if isinstance(value, tuple):
        name = type(value).__name__
        return {"kind": name if name in _KINDS else "", "of": [encoded(one) for one in value]}
    if value is None or isinstance(value, (bool, int, float, str, np.ndarray, np.generic)):
        return value
    raise TypeError(f"a {type(value).__name__} is no message")


def decoded(message: Any) -> Any:
    """What was encoded. Raises KeyError for an unknown kind."""
    if isinstance(message, dict):
        parts = [decoded(one) for one in message["of"]]
        return _KINDS[message["kind"]](*parts) if message["kind"] else tuple(parts)
    return message
