"""Judgement of the keys of a config that its family's reader has not taken.

The judge is transformers' own config class of that `model_type`. Its names and defaults are looked at; nothing is made of it. A
key that it does not define cannot change what transformers computes: it is accepted, and said in one line of warning. One that it
defines, and no reader here takes, is accepted at the class's default alone. Keys of generation are `checkpoints.checkpoint`'s.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from checkpoints.config_reader import ConfigReader
from checkpoints.errors import listed, one_line
from checkpoints.families.refusal import speaks_of_quantisation

# What transformers asks of any config, whether its class defines it or not, and where it then has no effect: masks and the cache
# ask for the first three, loading for the last.
_ASKED_OF_ALL: dict[str, Any] = {
    "is_causal": True,
    "layer_types": None,
    "kv_sharing_modes": None,
    "_rope_type_labels": None,
    "decoder": None,
    "generator": None,
    "text_config": None,
    "text_encoder": None,
    "configuration_files": None,
    "fusion_config": None,
    "transformers_weights": None,
}
_log = logging.getLogger("jaxllm")


def judge(reader: ConfigReader, model_type: str) -> None:
    """Accept or refuse what a reader has left. Raises CheckpointError naming a key."""
    reader.ignore(*filter(speaks_of_quantisation, reader.left))  # those that say it is not, or it would not have come to this
    if reader.left:
        defaults, generation = _defaults(model_type), _generation_keys()
        reader.ignore(*generation)
        for key in sorted(reader.left & defaults.keys()):
            reader.default(key, defaults[key])
    if unknown := sorted(reader.left) + reader.unread:
        _log.warning(
            "%s", one_line(f"{reader.where}: ignored, for transformers' {model_type} reads no such keys: {listed(unknown, 20)}")
        )


def _defaults(model_type: str) -> dict[str, Any]:
    """Every name that means something to the class, and the value at which it may be accepted; of what is no field, null."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # imports torch where it is: seconds

    kind = CONFIG_MAPPING[model_type]
    fields = {name: field.default for name, field in inspect.signature(kind.__init__).parameters.items()}
    return dict.fromkeys([*dir(kind), *kind.attribute_map]) | _ASKED_OF_ALL | fields


def _generation_keys() -> set[str]:
    from transformers import GenerationConfig

    return set(vars(GenerationConfig()))
