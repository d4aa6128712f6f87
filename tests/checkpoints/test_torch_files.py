"""Checkpoints that PyTorch pickled, Meta's shards too, open to the same numbers as safetensors, and run nothing."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz import PICKLES
from paths import SHARED
from safetensors.numpy import load_file
from tiny_checkpoint import write_tiny

from checkpoints.checkpoint import open_checkpoint, open_tokenizer
from checkpoints.errors import CheckpointError
from checkpoints.torch_files import TorchSource
from checkpoints.verify import compare
from jaxllm.commands.cli import main

torch = pytest.importorskip("torch")

LLAMA = SHARED / "llama" / "tokenizer.model"
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4, "hidden_size": 32, "vocab_size": 96}
Tensors = dict[str, Any]


def tensors_of(folder: Path, dtype: Any = None) -> Tensors:
    tensors = {name: torch.from_numpy(x) for name, x in load_file(folder / "model.safetensors").items()}
    return tensors if dtype is None else {name: x.to(dtype) for name, x in tensors.items()}


def pickled(folder: Path, source: Path, **files: Tensors) -> Path:
    """`folder`, with the source's config and these files."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    for name, tensors in files.items():
        torch.save(tensors, folder / f"{name}.bin")
    return folder


def same(a: Path, b: Path) -> bool:
    return all(one.equal for one in compare(open_checkpoint(a), open_checkpoint(b)))


def test_a_bin_file_holds_the_same(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    assert same(source, pickled(tmp_path / "one", source, pytorch_model=tensors_of(source)))
    names = list(tensors_of(source))
    halves = {f"pytorch_model-{i}": {name: tensors_of(source)[name] for name in names[i::2]} for i in range(2)}
    several = pickled(tmp_path / "several", source, **halves)
    weight_map = {name: f"{file}.bin" for file, tensors in halves.items() for name in tensors}
    (several / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert same(source, several)
    checkpoint = open_checkpoint(several)
    box = (slice(3, 7), slice(2, 5))
    whole = checkpoint.source.read("lm_head.weight", (slice(0, 97), slice(0, 24)))
    before = checkpoint.source.bytes_read
    np.testing.assert_array_equal(checkpoint.source.read("lm_head.weight", box), whole[box])
    assert checkpoint.source.bytes_read - before == 4 * 3 * 4


def test_sixteen_bits_and_the_old_format(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    for dtype in (torch.bfloat16, torch.float16):
        folder = pickled(tmp_path / str(dtype), source, pytorch_model=tensors_of(source, dtype))
        assert main(["convert", str(folder), str(tmp_path / f"{dtype}-converted")]) == 0
        rounded = {name: x.to(torch.float32).numpy() for name, x in tensors_of(source, dtype).items()}
        for name, x in load_file(tmp_path / f"{dtype}-converted" / "model.safetensors").items():
            np.testing.assert_array_equal(x.astype(np.float32), rounded[name])
    old = pickled(tmp_path / "old", source)
    torch.save(tensors_of(source), old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format from before 1\.6; load it and save it again"):
        open_checkpoint(old)


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_nothing_that_a_pickle_asks_for_is_run(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    folder = pickled(tmp_path / "evil", source, pytorch_model=tensors_of(source) | {"x": Evil(tmp_path / "was here")})
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds more than plain tensors"):
        open_checkpoint(folder)
    assert not (tmp_path / "was here").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: [tensors], "holds a list, not named tensors"),
        (lambda tensors: {"model": tensors}, "'model' is no plain tensor"),
        (lambda tensors: {name: x.to(torch.int8) for name, x in tensors.items()}, "is torch.int8; supported are"),
        (lambda tensors: tensors | {"x": torch.zeros(2)}, "no use for: x"),
    ],
)
def test_what_is_not_weights_is_named(tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny(tmp_path / "source")
    folder = pickled(tmp_path / "other", source, pytorch_model=change(tensors_of(source)))
    assert main(["convert", str(folder), str(tmp_path / "target")]) == 1
    assert message in capsys.readouterr().err


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source")
    folder = pickled(tmp_path / "cut", source, pytorch_model=tensors_of(source))
    whole = (folder / "pytorch_model.bin").read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 30):
        (folder / "pytorch_model.bin").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            open_checkpoint(folder)


def archive(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "data/0": bytes(64)}.items():
            file.writestr(f"archive/{name}", data)


NAME = b"X\1\0\0\0x"


@pytest.mark.parametrize("name", [name for name in PICKLES if name != "named"])
def test_what_a_loader_of_weights_alone_still_does_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "pytorch_model.bin", b"\x80\2}(" + NAME + PICKLES[name] + b"u.")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it is left to torch"))
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin (holds more than plain tensors|is truncated or corrupt \(a tup)"
    ):
        TorchSource(tmp_path)
    assert os.listdir(tmp_path) == ["pytorch_model.bin"]


def test_attributes_do_not_stand_for_methods(tmp_path: Path) -> None:
    archive(tmp_path / "pytorch_model.bin", b"\x80\2" + PICKLES["named"] + b".")
    assert TorchSource(tmp_path).tensors == {}


def test_archives_that_pytorch_does_not_write(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    archive(file, b"\x80\2}" + b"0" * 10_000 + b".", zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"its record archive/data\.pkl is compressed"):
        TorchSource(tmp_path)
    archive(file, b"\x80\2}.")
    data = bytearray(file.read_bytes())
    size = data.index(b"PK\1\2") + 20  # of the first record as stored, which zipfile would make room for
    data[size : size + 4] = (1 << 31).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"its record archive/data\.pkl is compressed"):
        TorchSource(tmp_path)
    archive(file, b"\x80\2" + b"}" * (1 << 23) + b".")
    with pytest.raises(CheckpointError, match=r"data\.pkl, not one of at most 8388608 bytes"):
        TorchSource(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1).expand(1 << 40), r"tensor x of \(1099511627776,\) is larger than what is stored of it"),
        (torch.zeros(0, 1 << 60), r"tensor x has the shape .* which no array can have"),
        (torch.zeros((1,) * 70), r"tensor x has the shape .* which no array can have"),
        (torch.zeros(2, 2).to_sparse(), r"holds more than plain tensors"),
        (torch.zeros(2, device="meta"), r"holds more than plain tensors"),
        (torch.zeros(2, dtype=torch.complex64).conj().imag, "'x' is no plain tensor"),
    ],
)
def test_a_tensor_that_numpy_cannot_look_at(tmp_path: Path, tensor: Any, message: str) -> None:
    torch.save({"x": tensor}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        TorchSource(tmp_path)


# Meta's release


def to_meta(x: Any, heads: int) -> Any:
    """The inverse of `permute` in transformers' convert_llama_weights_to_hf.py: the halves of a head become neighbours."""
    rows, columns = x.shape
    return x.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_meta(folder: Path, source: Path, parts: int, params: dict[str, Any] | None = None, embedding_axis: int = 1) -> Path:
    """The tensors of an HF folder as Meta gives them out, in so many model-parallel parts."""
    found, files = tensors_of(source, torch.bfloat16), [dict[str, Any]() for _ in range(parts)]

    def put(name: str, tensor: Any, axis: int | None) -> None:
        cut = [tensor] * parts if axis is None else tensor.chunk(parts, axis)
        for file, part in zip(files, cut, strict=True):
            file[name] = part.clone()

    put("tok_embeddings.weight", found["model.embed_tokens.weight"], embedding_axis)
    put("output.weight", found["lm_head.weight"], 0)
    put("norm.weight", found["model.norm.weight"], None)
    put("rope.freqs", torch.ones(2), None)
    for i in range(2):
        hf, meta = f"model.layers.{i}.", f"layers.{i}."
        put(f"{meta}attention.wq.weight", to_meta(found[f"{hf}self_attn.q_proj.weight"], 8), 0)
        put(f"{meta}attention.wk.weight", to_meta(found[f"{hf}self_attn.k_proj.weight"], 4), 0)
        put(f"{meta}attention.wv.weight", found[f"{hf}self_attn.v_proj.weight"], 0)
        put(f"{meta}attention.wo.weight", found[f"{hf}self_attn.o_proj.weight"], 1)
        put(f"{meta}feed_forward.w1.weight", found[f"{hf}mlp.gate_proj.weight"], 0)
        put(f"{meta}feed_forward.w2.weight", found[f"{hf}mlp.down_proj.weight"], 1)
        put(f"{meta}feed_forward.w3.weight", found[f"{hf}mlp.up_proj.weight"], 0)
        put(f"{meta}attention_norm.weight", found[f"{hf}input_layernorm.weight"], None)
        put(f"{meta}ffn_norm.weight", found[f"{hf}post_attention_layernorm.weight"], None)
    folder.mkdir()
    values = {"dim": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "norm_eps": 1e-6, "multiple_of": 8, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(values | (params or {})))
    for i, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{i:02d}.pth")
    return folder


@pytest.mark.parametrize(("parts", "embedding_axis"), [(1, 1), (2, 1), (4, 1), (4, 0)])
def test_metas_shards_are_joined(tmp_path: Path, parts: int, embedding_axis: int) -> None:
    source = write_tiny(tmp_path / "source", **HEADS)
    meta = write_meta(tmp_path / "meta", source, parts, embedding_axis=embedding_axis)
    assert main(["convert", str(source), str(tmp_path / "bf16"), "--dtype", "bfloat16"]) == 0
    found = list(compare(open_checkpoint(tmp_path / "bf16"), open_checkpoint(meta)))
    assert len(found) == 21 and all(one.equal for one in found)
    assert main(["convert", str(meta), str(tmp_path / "target")]) == 0
    bytes_of = {name: x.tobytes() for name, x in load_file(tmp_path / "target" / "model.safetensors").items()}
    assert bytes_of == {name: x.tobytes() for name, x in load_file(tmp_path / "bf16" / "model.safetensors").items()}
    config, expected = open_checkpoint(tmp_path / "target").config, open_checkpoint(meta).config
    assert config == expected and (config.max_position, config.num_kv_heads, config.intermediate_size) == (4096, 4, 40)


def test_a_box_reads_only_the_shards_it_is_in(tmp_path: Path) -> None:
    meta = write_meta(tmp_path / "meta", write_tiny(tmp_path / "source", **HEADS), 4)
    source = open_checkpoint(meta).source
    whole = source.read("layers.0.attention.wo.weight", (slice(0, 32), slice(0, 32)))
    before = source.bytes_read
    box = (slice(0, 32), slice(6, 18))  # of three shards
    np.testing.assert_array_equal(source.read("layers.0.attention.wo.weight", box), whole[box])
    assert source.bytes_read - before == 32 * 12 * 2


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, (4096, 10000.0, "default")),
        ({"rope_theta": 1000000.0}, (16384, 1000000.0, "default")),
        ({"rope_theta": 500000.0}, (8192, 500000.0, "default")),
        ({"rope_theta": 500000.0, "use_scaled_rope": True}, (131072, 500000.0, "llama3")),
    ],
)
def test_a_generation_is_told_by_its_rotary_embedding(tmp_path: Path, params: dict[str, Any], expected: Any) -> None:
    config = open_checkpoint(write_meta(tmp_path / "meta", write_tiny(tmp_path / "s", **HEADS), 1, params)).config
    assert config.rope is not None
    assert (config.max_position, config.rope.theta, config.rope.kind) == expected


def test_a_tokenizer_of_metas_travels_if_it_is_sentencepieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sentencepiece")
    meta = write_meta(tmp_path / "meta", write_tiny(tmp_path / "source", **HEADS), 1)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\n")  # beside the folder, and tiktoken's
    assert main(["convert", str(meta), str(tmp_path / "target")]) == 1
    assert "tokenizer.model is not SentencePiece's" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is not SentencePiece's"):
        open_tokenizer(meta)
    if not LLAMA.exists():
        pytest.skip(f"LLaMA's tokenizer is not at {LLAMA}")
    (tmp_path / "tokenizer.model").write_bytes(LLAMA.read_bytes())
    assert main(["convert", str(meta), str(tmp_path / "target")]) == 0
    tokenizer = open_checkpoint(tmp_path / "target").tokenizer()
    assert tokenizer("Hello world")["input_ids"] == [1, 15043, 3186]


@pytest.mark.parametrize(
    ("parts", "name", "shape", "message"),
    [
        (2, "tok_embeddings.weight", (4,), r"tok_embeddings\.weight is \(4,\), which is no part of a matrix"),
        (2, "layers.0.attention.wo.weight", (4,), r"wo\.weight is \(4,\), which is no part of a matrix"),
        (2, "layers.0.attention.wq.weight", (0, 4), r"wq\.weight is \(0, 4\), which is no part of a matrix"),
        (1, "tok_embeddings.weight", (), r"tok_embeddings\.weight is \(\), not a matrix"),
    ],
)
def test_parts_of_no_matrix_are_refused(tmp_path: Path, parts: int, name: str, shape: tuple[int, ...], message: str) -> None:
    meta = write_meta(tmp_path / "meta", write_tiny(tmp_path / "source", **HEADS), parts)
    for file in meta.glob("*.pth"):
        torch.save(torch.load(file) | {name: torch.zeros(shape)}, file)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(meta)


def test_more_heads_than_hidden_units_are_refused(tmp_path: Path) -> None:
    meta = write_meta(tmp_path / "meta", write_tiny(tmp_path / "source", **HEADS), 1, {"n_heads": 64})
    with pytest.raises(CheckpointError, match="head_dim is 0; it must be at least 1"):
        open_checkpoint(meta)


def test_metas_files_must_belong_together(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", **HEADS)
    meta = write_meta(tmp_path / "meta", source, 2)
    values = torch.load(meta / "consolidated.01.pth")
    for damage, message in [
        (lambda: torch.save(values | {"new": torch.zeros(2)}, meta / "consolidated.01.pth"), "lacks new, which another file has"),
        (lambda: torch.save(dict(list(values.items())[1:]), meta / "consolidated.01.pth"), "tok_embeddings.weight is not what"),
        (lambda: (meta / "consolidated.01.pth").rename(meta / "consolidated.02.pth"), "without a gap, and has consolidated.00"),
    ]:
        damage()
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(meta)
    (meta / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"params\.json is not valid JSON"):
        open_checkpoint(meta)
    other = write_meta(tmp_path / "other", source, 1, {"n_experts": 2})
    with pytest.raises(CheckpointError, match="unknown keys n_experts"):
        open_checkpoint(other)
