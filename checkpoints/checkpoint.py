"""A folder or a GGUF file, opened: config, names, weights to read, tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints.config_reader import read_json
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
SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; no weight has been read yet.

    Attributes:
      path: the folder or the `.gguf` file.
      family: its name among Hugging Face's.
      config: the architecture. `eos_token_ids` includes those of generation_config.json, after the config's own.
      source: where weights are read from.
      rules: how its tensors become parameters.
      make_tokenizer: see `tokenizer`.
      generation_defaults: what generation_config.json says of sampling, keys of `SAMPLING_KEYS` alone.
    """

    path: Path
    family: str
    config: ModelConfig
    source: Source
    rules: Rules
    make_tokenizer: Callable[[], Any]
    generation_defaults: dict[str, Any] = field(default_factory=dict)

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


def read_config(path: str | Path) -> ModelConfig:
    """The architecture alone: of a folder with config.json, nothing else needs to be there. Raises CheckpointError."""
    file = Path(path) / CONFIG
    if file.is_file():
        return read_hf(read_json(file), str(file))[1]
    return open_checkpoint(path).config


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a folder with config.json and weights, one of Meta's with params.json, or a `.gguf` file. Raises CheckpointError."""
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a folder with {CONFIG} and safetensors, or a .gguf file")
    source = GGUFSource(path)
    family, config, rules = read_gguf(source)
    return Checkpoint(path, family, config, source, rules, partial(build_tokenizer, source.metadata, source.where))


def _open_folder(folder: Path) -> Checkpoint:
    _refuse_links_out(folder)
    if (folder / PARAMS).exists() and not (folder / CONFIG).exists():
        meta = MetaSource(folder)
        family, config, rules = read_meta(meta)
        return Checkpoint(folder, family, config, meta, rules, partial(_sentencepiece, folder))
    if not (folder / CONFIG).exists():
        files = [file.name for file in sorted(folder.glob("*.gguf"))]
        remedy = f"open {files[0]} in it" if files else f"give a folder with {CONFIG}, or a .gguf file"
        raise CheckpointError(f"{folder} has no {CONFIG}; {remedy}")
    values = read_json(folder / CONFIG)
    family, config, rules = read_hf(values, str(folder / CONFIG))
    source, rules = _weights(folder, rules)
    if values.get("dtype") is None and values.get("torch_dtype") is None:
        # As transformers does: the weights say what the config does not.
        first = next((info.dtype for info in source.tensors.values()), "F32")
        config = replace(config, dtype=_DTYPES.get(first, "float32"))
    generation = read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}
    stops = token_ids(generation.get("eos_token_id"), str(folder / GENERATION), "eos_token_id")
    config = replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + stops)))
    defaults = {key: generation[key] for key in SAMPLING_KEYS if generation.get(key) is not None}
    return Checkpoint(folder, family, config, source, rules, partial(_tokenizer, folder), defaults)


def _refuse_links_out(folder: Path) -> None:
    """A folder from elsewhere could have this machine's files read, and copied by a conversion. The hub's cache has its own."""
    here = folder.resolve()
    allowed = [here, here.parent.parent / "blobs"] if here.parent.name == "snapshots" else [here]
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not any(file.resolve().is_relative_to(root) for root in allowed):
            raise CheckpointError(f"{file} is a link out of its folder, to {file.resolve()}: put the file itself there")


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

            return OrbaxSource(folder), rules.of_parameters()
        if any((folder / name).exists() for name in (SINGLE, INDEX)):
            return renamed(TorchSource(folder), rules), rules
    return renamed(SafetensorsSource(folder), rules), rules
