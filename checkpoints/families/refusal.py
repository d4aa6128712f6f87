"""Why a checkpoint is of no family here, in one sentence."""

from __future__ import annotations

import re
from typing import Any, NoReturn

from checkpoints.errors import CheckpointError

_OTHER_PARTS = ("vision_config", "audio_config", "text_config", "vision_tower", "mm_vision_tower")
_FORMATS = {
    "awq": "AWQ", "gptq": "GPTQ", "bitsandbytes": "bitsandbytes", "fp8": "FP8", "fbgemm_fp8": "FP8",
    "compressed-tensors": "compressed-tensors", "mxfp4": "MXFP4", "hqq": "HQQ", "eetq": "EETQ", "quanto": "Quanto",
}  # fmt: skip


def refuse_unknown(values: dict[str, Any], where: str, known: list[str]) -> NoReturn:
    """Raises CheckpointError for a config of another `model_type` than the known ones."""
    name, architectures = values.get("model_type"), values.get("architectures")
    classes = [x for x in architectures if isinstance(x, str)] if isinstance(architectures, list) else []
    families = ", ".join(known)
    if any(key in values for key in _OTHER_PARTS):
        raise CheckpointError(
            f"{where}: {name!r} is a model of text and images or sound, and only text decoders are supported; use its text model "
            f"where there is one, of: {families}"
        )
    if values.get("is_encoder_decoder") is True or any("MaskedLM" in one or "ConditionalGeneration" in one for one in classes):
        raise CheckpointError(f"{where}: {name!r} has an encoder, and only decoders are supported: {families}; use one of these")
    if "auto_map" in values:
        raise CheckpointError(
            f"{where}: {name!r} needs code of its own (`auto_map`), which is never run here; use a model of: {families}"
        )
    raise CheckpointError(f"{where}: architecture {name!r} is not supported; there are: {families}; convert to one of them")


def speaks_of_quantisation(key: str) -> bool:
    """Whether a key of a config says how the weights are quantised, by its name."""
    return key == "compression_config" or re.search(r"quanti[sz]|(^|_)quant(_|$)", key) is not None


def refuse_quantised(values: dict[str, Any], where: str) -> None:
    """Raises CheckpointError where one of them says that they are: `quantization_config`, MLX's `quantization`."""
    for key in filter(speaks_of_quantisation, values):
        if values[key] is not None and values[key] is not False:
            method = _method(values[key])
            name = _FORMATS.get(str(method).lower(), method)
            raise CheckpointError(
                f"{where}: `{key}` ({method}) is not supported: the weights are quantised as {name}; use those before "
                "quantisation, whose repository its model card names"
            )


def _method(quantisation: Any) -> Any:
    """The name of a quantisation method. MLX's has none, but the size of groups."""
    if not isinstance(quantisation, dict):
        return quantisation
    return quantisation.get("quant_method", "MLX" if "group_size" in quantisation else None)
