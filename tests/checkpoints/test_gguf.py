"""GGUF files: the same model as its safetensors, slices of every stored type, and refusals."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from fuzz import ARRAY, STRING, GGUFTensor, gguf_bytes
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from checkpoints.checkpoint import Checkpoint, open_checkpoint
from checkpoints.convert import convert, prepare
from checkpoints.errors import CheckpointError
from checkpoints.gguf import PLAIN, QUANTISED, GGUFSource
from checkpoints.gguf_tokenizer import build_tokenizer
from checkpoints.hub import WHEEL_MODELS, cache_dir
from checkpoints.load import load, names_of_parameters
from jaxllm.config import RopeConfig
from jaxllm.decoder.rope import inverse_frequencies
from sharding.layout import make_layout

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
METADATA: dict[str, Any] = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.attention.key_length": 8,
    "llama.attention.value_length": 8,
    "llama.rope.dimension_count": 8,
    "llama.rope.freq_base": 50000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 37,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
# llama.cpp's names, in the order of the Hugging Face ones.
LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
Tensors = dict[str, np.ndarray]


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """The permutation of query and key weights and biases in llama.cpp's convert_hf_to_gguf.py."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def hf_and_gguf(tied: bool, biased: bool, embed: int = 64) -> tuple[Tensors, Tensors]:
    """One random model under both formats' names and row orders."""
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    hf = {"model.embed_tokens.weight": random(37, embed), "model.norm.weight": random(embed)}
    gguf = {"token_embd.weight": hf["model.embed_tokens.weight"], "output_norm.weight": hf["model.norm.weight"]}
    if not tied:
        hf["lm_head.weight"] = gguf["output.weight"] = random(37, embed)
    outputs = {"q_proj": 72, "k_proj": 24, "v_proj": 24, "gate_proj": 96, "up_proj": 96}
    inputs = {"o_proj": 72, "down_proj": 96}
    for i in range(2):
        for theirs, name in LAYER.items():
            short = theirs.split(".")[-1]
            shape = (outputs.get(short, embed), inputs.get(short, embed))
            kinds = {"weight": shape[:1] if "norm" in short else shape}
            if biased and "norm" not in short:
                kinds["bias"] = shape[:1]
            for kind, of in kinds.items():
                x = hf[f"model.layers.{i}.{theirs}.{kind}"] = random(*of)
                heads = {"q_proj": 9, "k_proj": 3}.get(short)
                gguf[f"blk.{i}.{name}.{kind}"] = x if heads is None else permute(x, heads)
    return hf, gguf


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: Tensors,
    kind: Kind = Kind.F32,
    arch: str = "llama",
    align: int = 32,
    plain: str = "",
) -> Path:
    """A GGUF file whose matrices are of one kind; vectors, the matrix `plain` and rows without whole blocks float32.

    Of the kinds that `gguf` does not quantise to, matrices are random bytes.
    """
    writer = GGUFWriter(path, arch)
    writer.add_custom_alignment(align)
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in metadata.items():
        add[type(value)](key, value)
    for name, x in tensors.items():
        stored = Kind.F32 if x.ndim == 1 or name == plain or x.shape[-1] % GGML_QUANT_SIZES[kind][0] else kind
        if stored == Kind.F16:
            writer.add_tensor(name, x.astype(np.float16))
        else:
            raw = raw_tensor(stored, *x.shape) if stored.name.endswith("_K") else quantize(x, stored)
            writer.add_tensor(name, raw, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def open_pair(folder: Path, tied: bool, biased: bool, kind: Kind = Kind.F32) -> tuple[Checkpoint, Checkpoint]:
    hf, gguf = hf_and_gguf(tied, biased)
    values = CONFIG | {"tie_word_embeddings": tied, "attention_bias": biased, "mlp_bias": biased}
    (folder / "config.json").write_text(json.dumps(values))
    save_file(hf, folder / "model.safetensors")
    return open_checkpoint(folder), open_checkpoint(write_gguf(folder / "m.gguf", METADATA, gguf, kind))


def leaves(checkpoint: Checkpoint, devices: int) -> list[jax.Array]:
    layout = make_layout("tensor", jax.devices()[:devices], checkpoint.config.hidden_size)
    return load(checkpoint.source, checkpoint.rules, checkpoint.config, layout, "float32")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_and_safetensors_of_a_model_load_alike(tmp_path: Path, tied: bool, biased: bool) -> None:
    hf, gguf = open_pair(tmp_path, tied, biased)
    assert gguf.config == hf.config
    for a, b in zip(leaves(hf, 4), leaves(gguf, 4), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, "float16"), (Kind.BF16, "bfloat16"), (Kind.Q8_0, "float32")])
def test_stored_types_give_the_dtype_that_holds_them(tmp_path: Path, kind: Kind, dtype: str) -> None:
    tensors = {name: x for name, x in hf_and_gguf(False, False)[1].items() if x.shape[-1] % 32 == 0}
    assert open_checkpoint(write_gguf(tmp_path / "x.gguf", METADATA, tensors, kind)).config.dtype == dtype
    mixed = write_gguf(tmp_path / "mixed.gguf", METADATA, tensors, kind, plain="output.weight")
    assert open_checkpoint(mixed).config.dtype == "float32"


def raw_tensor(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Random stored bytes whose 16-bit scales are finite: any byte below 64 is."""
    block, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(kind.value)
    return rng.integers(0, 64, (rows, columns // block * size), dtype=np.uint8)


@pytest.mark.parametrize("kind", [*PLAIN, *QUANTISED], ids=lambda kind: kind.name)
def test_slices_of_every_stored_type(tmp_path: Path, kind: Kind) -> None:
    rows, columns = 300, 1024  # several groups of rows, and a remainder
    raw = raw_tensor(kind, rows, columns)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    if kind in PLAIN:
        raw = raw.view(PLAIN[kind] if kind != Kind.BF16 else np.uint8)
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFSource(tmp_path / "x.gguf")
    assert source.tensors["x"][:2] == ((rows, columns), kind.name)
    reference = GGUFReader(tmp_path / "x.gguf").tensors[0]
    whole = dequantize(np.asarray(reference.data), kind)
    for box in (
        (slice(0, rows), slice(0, columns)),
        (slice(7, 260), slice(0, columns)),
        (slice(3, 5), slice(250, 777)),
    ):
        got = source.read("x", box)
        assert got.dtype == PLAIN.get(kind, np.float32)
        np.testing.assert_array_equal(got.astype(np.float32), whole[box])
        assert got.flags.writeable == (kind not in PLAIN)  # plain ones are views of the file


@pytest.mark.parametrize("kind", [*PLAIN, *QUANTISED], ids=lambda kind: kind.name)
def test_a_conversion_holds_what_gguf_itself_dequantises(tmp_path: Path, kind: Kind) -> None:
    embed = max(64, GGML_QUANT_SIZES[kind][0])
    tensors = hf_and_gguf(False, False, embed)[1]
    path = write_gguf(tmp_path / "x.gguf", METADATA | {"llama.embedding_length": embed}, tensors, kind)
    convert(prepare(open_checkpoint(path), tmp_path / "out"))
    after = load_file(tmp_path / "out" / "model.safetensors")
    stored = GGUFReader(path).tensors
    assert {t.tensor_type for t in stored if len(t.shape) > 1} >= {kind}
    reference = {t.name: dequantize(np.asarray(t.data), t.tensor_type) for t in stored}
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    names |= {f"blk.{i}.{theirs}": f"model.layers.{i}.{ours}" for i in range(2) for ours, theirs in LAYER.items()}
    assert len(reference) == len(after) == len(names)
    for theirs, ours in names.items():
        x, y = reference[f"{theirs}.weight"], after[f"{ours}.weight"]
        heads = {"attn_q": 9, "attn_k": 3}.get(theirs.split(".")[-1])
        y = y if heads is None else permute(y, heads)
        assert y.dtype == PLAIN.get(kind, np.float32) or "norm" in theirs
        np.testing.assert_array_equal(y.astype(np.float32), x.reshape(y.shape))


def test_rows_are_read_exactly_and_columns_by_blocks(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    source = GGUFSource(write_gguf(tmp_path / "x.gguf", {}, {"x": x}, Kind.Q8_0))
    source.read("x", (slice(10, 20), slice(0, 128)))
    assert source.bytes_read == 10 * 4 * 34
    source.read("x", (slice(0, 1), slice(31, 33)))
    assert source.bytes_read == 10 * 4 * 34 + 2 * 34


@pytest.mark.parametrize("align", [32, 256])
def test_the_header_is_what_the_reference_reader_sees(tmp_path: Path, align: int) -> None:
    metadata = METADATA | {"a.list": [1.5, 2.5], "a.words": ["ü", ""], "a.flag": True}
    path = write_gguf(tmp_path / "x.gguf", metadata, hf_and_gguf(False, True)[1], align=align)
    source, reference = GGUFSource(path), GGUFReader(path)
    fields = {key: f.contents() for key, f in reference.fields.items() if not key.startswith("GGUF.")}
    assert source.metadata == fields
    assert {name: info.shape for name, info in source.tensors.items()} == {
        t.name: tuple(reversed(t.shape.tolist())) for t in reference.tensors
    }
    for tensor in reference.tensors:
        box = tuple(slice(0, size) for size in source.tensors[tensor.name].shape)
        np.testing.assert_array_equal(source.read(tensor.name, box), tensor.data)


def test_files_cut_anywhere_are_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "x.gguf", METADATA, hf_and_gguf(False, False)[1]).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(0, 3000, 37), len(whole) // 2, len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf .*fetch it again$"):
            GGUFSource(cut)


@pytest.mark.parametrize(
    ("at", "to", "message"),
    [
        (0, b"GGML", "is not a GGUF file"),
        (4, b"\x00\x00\x00\x03", "is GGUF version"),
        (4, b"\x01", "is GGUF version 1"),
        (8, b"\xff" * 8, "truncated or corrupt header"),
        (16, b"\xff" * 8, "truncated or corrupt header"),
        (24, b"\xff" * 8, "truncated or corrupt header"),
        (-1, b"general.alignment\x04\x00\x00\x00\x00", "truncated or corrupt header"),
        (-1, b"general.alignment\x06", "truncated or corrupt header"),
        (24 + 8, b"\xff", "truncated or corrupt header"),
    ],
)
def test_corrupt_headers_are_refused(tmp_path: Path, at: int, to: bytes, message: str) -> None:
    path = write_gguf(tmp_path / "x.gguf", METADATA, hf_and_gguf(False, False)[1])
    whole = bytearray(path.read_bytes())
    at = whole.index(to[:17]) if at < 0 else at  # where the key is
    whole[at : at + len(to)] = to
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=message):
        GGUFSource(path)


def strings(count: int) -> bytes:
    return struct.pack("<IQ", STRING, count) + bytes(8 * count)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ([], [GGUFTensor("x", (), 8, 0)], r"tensor x has 0 axes, not 1 to 4; fetch"),
        ([], [GGUFTensor("x", (1,) * 70, 0, 0)], r"tensor x has 70 axes, not 1 to 4; fetch"),
        (
            [],
            [GGUFTensor("x", (0, 1 << 63), 0, 0)],
            r"tensor x has the shape \(0, 9223372036854775808\), which no array can have",
        ),
        ([], [GGUFTensor("x", (1 << 58, 0), 8, 0)], r"which no array can have"),
        ([], [GGUFTensor("x\n", (1 << 30,), 0, 0)], r"x\.gguf ends before tensor x\\n does"),
        ([], [GGUFTensor("x", (1,), 0, 0)] * 2, r"\(x is there twice\); fetch"),
        ([("a", 4, bytes(4)), ("a", 4, bytes(4))], [], r"\(a is there twice\); fetch"),
        ([("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 20 + struct.pack("<IQ", 4, 0))], [], "arrays nested more than 8 deep"),
        ([("a", ARRAY, strings((1 << 21) + 1))], [], r"a count of 2097153"),
        ([("a", ARRAY, strings(1 << 20)), ("b", ARRAY, strings((1 << 20) + 1))], [], r"a count of 1048577"),
        ([(f"{i}", 0, b"1") for i in range((1 << 16) + 1)], [], r"a count of 65537"),
        ([], [GGUFTensor(f"{i}", (1,), 0, 0) for i in range((1 << 16) + 1)], r"a count of 65537"),
    ],
)
def test_what_no_model_has_is_refused(
    tmp_path: Path, metadata: list[tuple[str, int, bytes]], tensors: list[GGUFTensor], message: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(metadata, tensors, bytes(64)))
    with pytest.raises(CheckpointError, match=message):
        GGUFSource(tmp_path / "x.gguf")


def test_a_tensor_of_no_blocks_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_bytes([], [GGUFTensor("x", (0, 32), 8, 0)], bytes(64)))
    box = GGUFSource(tmp_path / "x.gguf").read("x", (slice(0, 0), slice(0, 32)))
    assert box.shape == (0, 32) and box.dtype == np.float32


@pytest.mark.parametrize(("shape", "head"), [((2, 2), 8), ((4,), 1 << 30)])
def test_frequencies_of_another_shape_are_not_computed(tmp_path: Path, shape: tuple[int, ...], head: int) -> None:
    tensors = hf_and_gguf(False, False)[1] | {"rope_freqs.weight": np.ones(shape, np.float32)}
    metadata = METADATA | {
        f"llama.{key}": head for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")
    }
    with pytest.raises(CheckpointError, match=rf"rope_freqs\.weight is \({shape[0]}, ?2?\), not \({head // 2},\)"):
        open_checkpoint(write_gguf(tmp_path / "x.gguf", metadata, tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.expert_count": 8}, "`llama.expert_count` is 8"),
        ({"llama.rope.dimension_count": 4}, "`llama.rope.dimension_count` is 4, and only 8"),
        ({"llama.vocab_size": 40}, "`llama.vocab_size` is 40, and only 37"),
        ({"llama.attention.sliding_window": 64}, r"unknown keys llama\.attention\.sliding_window"),
        ({"llama.embedding_length": "big"}, "`llama.embedding_length` is 'big', which is not of type int"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"split.count": 2}, "`split.count` is 2"),
        ({"llama.attention.head_count_kv": 2}, "9 query heads cannot share 2"),
    ],
)
def test_metadata_that_is_not_understood_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "x.gguf", METADATA | changes, hf_and_gguf(False, False)[1])
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_other_architectures_and_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="architecture 'gpt9' is not supported in GGUF; there are: llama"):
        open_checkpoint(write_gguf(tmp_path / "x.gguf", {}, {"x": np.zeros((2, 32), np.float32)}, arch="gpt9"))
    writer = GGUFWriter(tmp_path / "y.gguf", "llama")
    writer.add_tensor("x", np.zeros((2, 18), np.uint8), raw_dtype=Kind.IQ4_NL)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="tensor x is IQ4_NL; use a file of F32, F16"):
        open_checkpoint(tmp_path / "y.gguf")


def test_tensors_the_config_is_read_from_must_be_there(tmp_path: Path) -> None:
    tensors = hf_and_gguf(False, False)[1]
    path = tmp_path / "x.gguf"
    write_gguf(path, METADATA, {key: x for key, x in tensors.items() if key != "token_embd.weight"})
    with pytest.raises(CheckpointError, match=r"lacks tensor token_embd\.weight"):
        open_checkpoint(path)
    checkpoint = open_checkpoint(write_gguf(path, METADATA, {key: x for key, x in tensors.items() if "blk.0.attn_q" not in key}))
    with pytest.raises(CheckpointError, match=r"lacks tensors blk\.0\.attn_q\.weight"):
        leaves(checkpoint, 1)
    source = GGUFSource(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="has no tensor nothing"):
        source.read("nothing", (slice(0, 1),))


def test_stop_ids_of_turn_and_message_count(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 2}
    path = write_gguf(tmp_path / "x.gguf", METADATA | extra, hf_and_gguf(False, False)[1])
    assert open_checkpoint(path).config.eos_token_ids == (2, 9)


def test_linear_rope_scaling(tmp_path: Path) -> None:
    extra = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "x.gguf", METADATA | extra, hf_and_gguf(False, False)[1])
    rope = RopeConfig(kind="linear", theta=50000.0, factor=4.0, original_max_position=128)
    assert open_checkpoint(path).config.rope == rope


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3s_stretch_is_recognised_from_its_tensor(tmp_path: Path, factor: float) -> None:
    rope = RopeConfig(kind="llama3", theta=50000.0, factor=factor, original_max_position=8192)
    tensors = hf_and_gguf(False, False)[1] | {"rope_freqs.weight": _llama_cpp_divisors(rope, 8)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "x.gguf", METADATA, tensors))
    assert checkpoint.config.rope == rope
    leaves(checkpoint, 2)
    assert len(names_of_parameters(checkpoint.config)) == len(tensors) - 1
    tensors["rope_freqs.weight"][-1] += 0.5
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is none of the known Llama 3 stretches"):
        open_checkpoint(write_gguf(tmp_path / "y.gguf", METADATA, tensors))


def _llama_cpp_divisors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """As convert_hf_to_gguf.py computes `rope_freqs.weight`."""
    divisors = []
    for frequency in inverse_frequencies(RopeConfig(theta=rope.theta), head_dim).astype(np.float64):
        wavelength = 2 * np.pi / frequency
        if wavelength < rope.original_max_position / rope.high_freq_factor:
            divisors.append(1.0)
        elif wavelength > rope.original_max_position / rope.low_freq_factor:
            divisors.append(rope.factor)
        else:
            smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
                rope.high_freq_factor - rope.low_freq_factor
            )
            divisors.append(1 / ((1 - smooth) / rope.factor + smooth))
    return np.array(divisors, np.float32)


def vocabulary(pre: str) -> dict[str, Any]:
    """A byte-level vocabulary of 256 bytes, two merges and one control token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), "ĊĊ", "ĠĠ", "<|end|>"]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 258 + [3],
        "tokenizer.ggml.merges": ["Ċ Ċ", "Ġ Ġ"],
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.chat_template": "{{ messages[0].content }}<|end|>",
    }


def test_the_tokenizer_of_a_file() -> None:
    tokenizer = build_tokenizer(vocabulary("gpt-2"), "x.gguf")
    text = "añ <|end|>b\n\n1"
    ids = tokenizer(text)["input_ids"]
    assert 258 in ids and tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (258, None)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<|end|>"
    assert build_tokenizer({"general.architecture": "llama"}, "x.gguf") is None


def test_smollms_digits_stand_alone() -> None:
    """A run of blanks before a digit stays whole when digits are cut off first, as SmolLM's tokenizer was trained."""
    tokens = {pre: build_tokenizer(vocabulary(pre), "x").tokenize("\n\n1  2") for pre in ("smollm", "gpt-2")}
    assert tokens == {"smollm": ["ĊĊ", "1", "ĠĠ", "2"], "gpt-2": ["Ċ", "Ċ", "1", "Ġ", "Ġ", "2"]}


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"x\.gguf: `tokenizer\.ggml\.pre` 'novel' is not supported; there are"):
        build_tokenizer(vocabulary("novel"), "x.gguf")


def test_an_unknown_vocabulary_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"its vocabulary cannot be converted .*'plamo2'"):
        build_tokenizer(vocabulary("default") | {"tokenizer.ggml.model": "plamo2"}, "x.gguf")


def test_a_tokenizer_needs_no_torch(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", METADATA | vocabulary("smollm"), hf_and_gguf(False, False)[1])
    program = f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "torch" else find(name, package)
sys.modules["torch"] = None
from checkpoints.checkpoint import open_checkpoint
print(open_checkpoint({str(tmp_path / "x.gguf")!r}).tokenizer()("a1")["input_ids"])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)) == 2


MODEL = cache_dir() / "smollm2-135m" / Path(WHEEL_MODELS["smollm2-135m"].member).name


@pytest.mark.skipif(not MODEL.exists(), reason="fetched by nothing but `resolve('smollm2-135m')`")
def test_smollm2() -> None:
    checkpoint = open_checkpoint(MODEL)
    assert (checkpoint.config.num_heads, checkpoint.config.num_kv_heads, checkpoint.config.tied_head) == (9, 3, True)
    assert sum(x.size for x in leaves(checkpoint, 1)) == checkpoint.config.num_params
    tokenizer = checkpoint.tokenizer()
    assert tokenizer.decode(tokenizer("Hello, world  12")["input_ids"]) == "Hello, world  12"
