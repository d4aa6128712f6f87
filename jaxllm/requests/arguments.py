"""Arguments of `LLM` and its methods, in the one form that the rest takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxllm.requests import checks
from jaxllm.requests.outputs import RequestError
from jaxllm.requests.sampling_params import SamplingParams

Bar = bool | Callable[..., Any]
ManyParams = SamplingParams | Sequence[SamplingParams] | None
_DTYPES = {"half": "float16", "float": "float32"}  # vLLM's other names


def dtype_name(dtype: Any) -> str | None:
    """A name, or jax's or numpy's own dtype, as a name; None for what is left to the plan."""
    if dtype is None or isinstance(dtype, str):
        return None if dtype in (None, "auto") else _DTYPES.get(dtype, dtype)
    try:
        return str(np.dtype(dtype))
    except TypeError:
        return str(dtype).removeprefix("torch.")


def params_for_each(params: ManyParams, count: int) -> list[SamplingParams]:
    """One SamplingParams for each prompt, a copy each, so that what the caller changes later changes no request."""
    if isinstance(params, SamplingParams):
        return [params.clone()] * count
    if isinstance(params, Mapping):
        raise RequestError(f"sampling_params={checks.shown(params)} is a dict: give SamplingParams(**it)")
    many = checks.items("sampling_params", params, "SamplingParams, or a list of them")
    if other := [one for one in many if not isinstance(one, SamplingParams)]:
        raise RequestError(f"sampling_params holds {checks.shown(other[0])}: give SamplingParams, one for each prompt")
    if len(many) != count:
        raise RequestError(f"{len(many)} sampling_params for {count} prompts: give one, or one for each")
    return [one.clone() for one in many]


def progress_bar(use_tqdm: Bar, total: int) -> Any:
    """tqdm's bar of so many prompts, on a terminal alone; or what the caller makes bars with."""
    make = use_tqdm if callable(use_tqdm) else tqdm
    hidden = {} if callable(use_tqdm) else {"disable": None if use_tqdm else True, "leave": False}  # None: where no terminal is
    return make(total=total, desc="generating", unit="prompt", **hidden)


def show_progress(bar: Any, done: int, waits_for: str) -> None:
    """Move a bar of `progress_bar` to so many prompts; name the program that is compiled, and how to have that done before."""
    if isinstance(bar, tqdm):
        bar.set_postfix_str(waits_for and f"compiling {waits_for}; `jaxllm warmup` does it ahead")
    bar.update(done - bar.n)
