"""A folder or a file is opened: its links, overrides of its config, its tokenizer, its defaults of sampling."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import CONFIG, write_tiny, write_tokenizer

from checkpoints.checkpoint import open_checkpoint, open_tokenizer, read_config
from checkpoints.convert import convert, prepare
from checkpoints.errors import CheckpointError
from checkpoints.verify import compare

pytestmark = pytest.mark.fast


def test_links_of_a_folder_are_followed(tmp_path: Path) -> None:
    """The hub's cache has links to its blobs, which may be links themselves where storage is shared."""
    elsewhere = write_tokenizer(write_tiny(tmp_path / "elsewhere"))
    own, cached, blobs = tmp_path / "own", tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    for folder in (own, cached, blobs):
        folder.mkdir(parents=True)
    for file in elsewhere.iterdir():
        (own / file.name).symlink_to(file)
        (blobs / file.name).symlink_to(file)
        (cached / file.name).symlink_to(f"../../blobs/{file.name}")
    for folder in (own, cached):
        checkpoint = open_checkpoint(folder)
        assert all(one.equal for one in compare(checkpoint, open_checkpoint(elsewhere)))
        assert checkpoint.tokenizer().decode([104, 105]) == "hi"
    convert(prepare(open_checkpoint(own), tmp_path / "copy"))
    assert not any(file.is_symlink() for file in (tmp_path / "copy").iterdir())
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (elsewhere / "tokenizer.json").read_bytes()


def test_an_index_leads_to_no_file_elsewhere(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    for file in ("../model.safetensors", str(tmp_path / "model.safetensors")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
        with pytest.raises(CheckpointError, match=r"is said to be in .*, outside the folder; put its file beside the index"):
            open_checkpoint(folder)
    (folder / "linked.safetensors").symlink_to(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "linked.safetensors"}}))
    assert "lm_head.weight" in open_checkpoint(folder).source.tensors


def test_sampling_defaults_are_the_configs_where_there_is_no_other_file(tmp_path: Path) -> None:
    keys = {"temperature": 0.6, "do_sample": True, "top_k": 7, "repetition_penalty": None, "max_length": 50, "num_beams": 2}
    checkpoint = open_checkpoint(write_tiny(tmp_path, **keys))
    assert checkpoint.generation_defaults == {"do_sample": True, "temperature": 0.6, "top_k": 7}
    (tmp_path / "generation_config.json").write_text("{}")
    assert open_checkpoint(tmp_path).generation_defaults == {}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(("key", "value"), [("temperature", "0.6"), ("top_k", 1.5), ("do_sample", 1), ("top_p", math.nan)])
def test_sampling_defaults_of_a_wrong_type_are_refused(tmp_path: Path, file: str, key: str, value: Any) -> None:
    write_tiny(tmp_path)
    values = (CONFIG if file == "config.json" else {}) | {key: value}
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"{tmp_path / file}: `{key}` is '?{value}'?, which is not "):
        open_checkpoint(tmp_path)


def test_overrides_are_laid_over_the_config(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    plain = open_checkpoint(write_tiny(tmp_path, rope_scaling=rope))
    overrides = {"rope_scaling": {"factor": 3.0}, "eos_token_id": 7, "temperature": 0.5, "max_position_embeddings": 77}
    changed = open_checkpoint(tmp_path, overrides)
    assert changed.config == read_config(tmp_path, overrides) and changed.generation_defaults == {"temperature": 0.5}
    assert plain.config.rope is not None and changed.config.rope is not None
    assert (plain.config.rope.factor, changed.config.rope.factor, changed.config.rope.kind) == (2.0, 3.0, "linear")
    assert changed.config.max_position == 77 and changed.config.eos_token_ids == (7,)
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"] == rope
    assert open_checkpoint(tmp_path, {}).config == plain.config
    with pytest.raises(CheckpointError, match=r"config.json with hf_overrides: `vocab_size` is 'x', which is not of type int"):
        open_checkpoint(tmp_path, {"vocab_size": "x"})


@pytest.mark.parametrize("overrides", [[("a", 1)], "{}", {1: 2}, {"rope_scaling": {1: 2}}, len])
def test_overrides_are_a_mapping(tmp_path: Path, overrides: Any) -> None:
    write_tiny(tmp_path)
    for opened in (open_checkpoint, read_config):
        with pytest.raises(CheckpointError, match=r"^hf_overrides is .*; give a mapping from keys of config.json to values"):
            opened(tmp_path, overrides)


def test_a_tokenizer_is_opened_alone(tmp_path: Path) -> None:
    folder = write_tokenizer(write_tiny(tmp_path / "model"))
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in folder.glob("tokenizer*"):
        (alone / file.name).write_bytes(file.read_bytes())
    expected = open_checkpoint(folder).tokenizer().encode("hi")
    assert open_tokenizer(alone).encode("hi") == open_tokenizer(folder).encode("hi") == expected
    with pytest.raises(CheckpointError, match=f"{tmp_path} has no tokenizer; give a folder with one of tokenizer.json"):
        open_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_tokenizer(tmp_path / "nothing")


def test_overrides_need_a_config(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text("{}")
    for path in (tmp_path / "m.gguf", tmp_path / "meta"):
        with pytest.raises(CheckpointError, match=rf"^{path} has no config.json that hf_overrides could change; leave them out"):
            open_checkpoint(path, {"vocab_size": 8})


def test_biases_that_the_config_does_not_tell_of_are_refused(tmp_path: Path) -> None:
    """`bias` is InternLM's own key: LLaMA's class has none, and would pass such tensors over."""
    folder = write_tiny(tmp_path, bias=True)
    assert prepare(open_checkpoint(folder), tmp_path / "target")
    biases = {f"model.layers.{i}.self_attn.q_proj.bias": np.zeros(48, np.float32) for i in range(2)}
    save_file(load_file(folder / "model.safetensors") | biases, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
        prepare(open_checkpoint(folder), tmp_path / "target")
