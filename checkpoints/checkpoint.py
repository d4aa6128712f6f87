"""A folder or a GGUF file, opened: config, names, weights to read, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints.config_reader import ConfigReader, overlaid, read_json
from checkpoints.errors import CheckpointError
from checkpoints.families import read_gguf, read_hf, read_meta
from checkpoints.families.hf_common import token_ids
from checkpoints.gguf import GGUFSource
from checkpoints.gguf_tokenizer import build_tokenizer
from checkpoints.meta import PARAMS, MetaSource
from checkpoints.names import Rules
from checkpoints.renamed import renamed
from checkpoints.safetensors import SafetensorsSource
from checkpoints.source import ORBAX, Source
from checkpoints.torch_files import INDEX, SINGLE, TorchSource
from jaxllm.config import ModelConfig

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
SAMPLING_KEYS: dict[str, type] = {
    "do_sample": bool,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "max_new_tokens": int,
}
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; no weight has been read yet.

    Attributes:
      path: the folder or the `.gguf` file.
      family: its name among Hugging Face's.
      config: the architecture. `eos_token_ids` includes those of generation_config.json, after the config's own.
      source: the source of the weights.
      rules: the rules by which its tensors become parameters.
      make_tokenizer: see `tokenizer`.
      generation_defaults: sampling defaults of generation_config.json, or of config.json where there is no such file; keys of
        `SAMPLING_KEYS` alone, none of them null.
      values: of config.json, as they were read; None where there is none.
    """

    path: Path
    family: str
    config: ModelConfig
    source: Source
    rules: Rules
    make_tokenizer: Callable[[], Any]
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    values: Mapping[str, Any] | None = None

    def tokenizer(self) -> Any:
        """A transformers tokenizer, chat template included; None when the checkpoint has none."""
        return self.make_tokenizer()

    @property
    def is_hugging_faces(self) -> bool:
        """Whether it is a folder of Hugging Face's form, whose files can travel as they are."""
        return (self.path / CONFIG).is_file()

    def with_weights(self, source: Source, rules: Rules) -> Checkpoint:
        """The same model with weights from elsewhere."""
        return replace(self, source=source, rules=rules)


def read_config(path: str | Path, hf_overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The architecture alone: of a folder with config.json, nothing else needs to be there. Raises CheckpointError."""
    if (Path(path) / CONFIG).is_file():
        values, where = _read_values(Path(path), hf_overrides)
        return read_hf(values, where)[1]
    return open_checkpoint(path, hf_overrides).config


def open_checkpoint(path: str | Path, hf_overrides: Mapping[str, Any] | None = None) -> Checkpoint:
    """Open a folder with config.json and weights, one of Meta's with params.json, or a `.gguf` file. Raises CheckpointError.

    `hf_overrides` are laid over config.json's values before they are read.

    Links in a folder are followed, wherever they lead, and a conversion copies what is behind them: whoever names a folder
    vouches for its links. What is written in its files leads nowhere else: an index names files of the folder alone.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, hf_overrides)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a folder with {CONFIG} and safetensors, or a .gguf file")
    _refuse_overrides(path, hf_overrides)
    source = GGUFSource(path)
    family, config, rules = read_gguf(source)
    return Checkpoint(path, family, config, source, rules, partial(build_tokenizer, source.metadata, source.where))


def open_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a folder, which may hold nothing else, or of a `.gguf` file. Raises CheckpointError if there is none."""
    path = Path(path)
    if path.is_dir():
        tokenizer = _sentencepiece(path) if _is_metas(path) else _tokenizer(path)
    else:
        tokenizer = open_checkpoint(path).tokenizer()
    if tokenizer is None:
        raise CheckpointError(f"{path} has no tokenizer; give a folder with one of {', '.join(TOKENIZER_FILES)}")
    return tokenizer


def _refuse_overrides(path: Path, hf_overrides: Mapping[str, Any] | None) -> None:
    if hf_overrides:
        raise CheckpointError(f"{path} has no {CONFIG} that hf_overrides could change; leave them out")


def _read_values(folder: Path, hf_overrides: Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    """The values of config.json, and its name for messages."""
    values, where = read_json(folder / CONFIG), str(folder / CONFIG)
    return (values, where) if hf_overrides is None else (overlaid(values, hf_overrides), f"{where} with hf_overrides")


def _is_metas(folder: Path) -> bool:
    return (folder / PARAMS).exists() and not (folder / CONFIG).exists()


def _open_folder(folder: Path, hf_overrides: Mapping[str, Any] | None) -> Checkpoint:
    if _is_metas(folder):
        _refuse_overrides(folder, hf_overrides)
        meta = MetaSource(folder)
        family, config, rules = read_meta(meta)
        return Checkpoint(folder, family, config, meta, rules, partial(_sentencepiece, folder))
    if not (folder / CONFIG).exists():
        files = [file.name for file in sorted(folder.glob("*.gguf"))]
        remedy = f"open {files[0]} in it" if files else f"give a folder with {CONFIG}, or a .gguf file"
        raise CheckpointError(f"{folder} has no {CONFIG}; {remedy}")
    return _of_folder(folder, *_read_values(folder, hf_overrides), lambda rules: _weights(folder, rules))


def of_config(config: Mapping[str, Any] | Path, source: Source) -> Checkpoint:
    """A checkpoint of weights that no file holds, and of the values of a config.json or a folder with one.

    The folder's tokenizer and generation defaults are the checkpoint's. Raises CheckpointError.
    """
    if isinstance(config, Mapping):
        family, found, rules = read_hf(dict(config), where := f"the {CONFIG} given")
        found, defaults = _with_dtype(found, config, source), _read_sampling(dict(config), where)
        return Checkpoint(Path(source.where), family, found, source, rules, lambda: None, defaults, dict(config))
    if not (config / CONFIG).is_file():
        raise CheckpointError(f"{config} has no {CONFIG}; give a folder with one, or its values")
    return _of_folder(config, *_read_values(config, None), lambda rules: (source, rules))


def _of_folder(folder: Path, values: dict[str, Any], where: str, weights: Callable[[Rules], tuple[Source, Rules]]) -> Checkpoint:
    family, config, rules = read_hf(values, where)
    source, rules = weights(rules)
    config, sampling = _with_dtype(config, values, source), values
    if (folder / GENERATION).exists():
        sampling, where = read_json(folder / GENERATION), str(folder / GENERATION)
    stops = token_ids(sampling.get("eos_token_id"), where, "eos_token_id")
    config = replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + stops)))
    defaults = _read_sampling(sampling, where)
    return Checkpoint(folder, family, config, source, rules, partial(_tokenizer, folder), defaults, values)


def _with_dtype(config: ModelConfig, values: Mapping[str, Any], source: Source) -> ModelConfig:
    """As transformers does: the weights say what the config does not."""
    if values.get("dtype") is not None or values.get("torch_dtype") is not None:
        return config
    first = next((info.dtype for info in source.tensors.values()), "F32")
    return replace(config, dtype=_DTYPES.get(first, "float32"))


def _read_sampling(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Sampling defaults. Raises CheckpointError where a value is of another type than sampling takes."""
    reader = ConfigReader(values, where)
    found = {key: reader.optional(key, kind) for key, kind in SAMPLING_KEYS.items()}
    return {key: value for key, value in found.items() if value is not None}


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded ({error}); fetch it again") from error


def _sentencepiece(folder: Path) -> Any:
    """The tokenizer of a folder of Meta's: in it, or beside it, where one serves several sizes of the model."""
    file = next((f for f in (folder / "tokenizer.model", folder.parent / "tokenizer.model") if f.is_file()), None)
    if file is None:
        return None
    try:
        from sentencepiece import SentencePieceProcessor

        SentencePieceProcessor(model_file=str(file))
        from transformers import LlamaTokenizer

        return LlamaTokenizer.from_pretrained(file.parent, local_files_only=True, add_bos_token=True)
    except ImportError as error:
        raise CheckpointError(f"{file} needs SentencePiece ({error}): pip install 'jaxllm[sentencepiece]'") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:  # Llama 3's is tiktoken's, of the same name
        raise CheckpointError(f"{file} is not SentencePiece's: move it away, and use the tokenizer.json of the hub") from error


def _weights(folder: Path, rules: Rules) -> tuple[Source, Rules]:
    """Safetensors where there are any, else Orbax's arrays, else what PyTorch pickled; and the names of its tensors."""
    if not any(folder.glob("*.safetensors")):
        if (folder / ORBAX).is_dir():
            from checkpoints.orbax import OrbaxSource  # takes a second to import

            rules = rules.of_parameters()
            return renamed(OrbaxSource(folder), rules), rules
        if any((folder / name).exists() for name in (SINGLE, INDEX)):
            return renamed(TorchSource(folder), rules), rules
    return renamed(SafetensorsSource(folder), rules), rules
