"""Why a checkpoint is of no family here, in one sentence."""

from __future__ import annotations

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


def refuse_quantised(quantisation: Any, where: str) -> NoReturn:
    """Raises CheckpointError for a `quantization_config`."""
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    name = _FORMATS.get(str(method).lower(), method)
    raise CheckpointError(
        f"{where}: `quantization_config` ({method}) is not supported: the weights are quantised as {name}; use those before "
        "quantisation, whose repository its model card names"
    )
