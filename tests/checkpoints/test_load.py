"""Checkpoints load to the same parameters in every layout, reading only the bytes that are asked for."""

import json
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from fuzz import safetensors_bytes
from safetensors.numpy import save_file

from checkpoints.checkpoint import Checkpoint, open_checkpoint
from checkpoints.errors import CheckpointError
from checkpoints.load import load, match_tensors, random_leaves, read_shard
from checkpoints.parameters import Leaf, Parameter, leaves
from checkpoints.safetensors import SafetensorsSource
from jaxllm.config import ModelConfig
from jaxllm.decoder.model import Decoder
from sharding.layout import Layout, make_layout
from sharding.padding import PAD

pytestmark = pytest.mark.fast

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 23,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "attention_bias": True,
    "mlp_bias": True,
    "dtype": "float32",
}
Tensors = dict[str, np.ndarray]


def hf_tensors(config: dict[str, Any], dtype: Any = np.float32) -> Tensors:
    """Random tensors with the names and shapes of transformers' LlamaForCausalLM."""
    d, f, v, h = config["hidden_size"], config["intermediate_size"], config["vocab_size"], config["head_dim"]
    n, k = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (v, d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (d,)
        sizes = {"q": (n, d), "k": (k, d), "v": (k, d), "o": (d, n)}
        linear = {f"self_attn.{x}_proj": (shape, "attention_bias") for x, shape in sizes.items()}
        linear |= {f"mlp.{x}_proj": ((f, d), "mlp_bias") for x in ("gate", "up")}
        linear["mlp.down_proj"] = ((d, f), "mlp_bias")
        for name, (shape, bias) in linear.items():
            shapes[f"{layer}{name}.weight"] = shape
            if config.get(bias):
                shapes[f"{layer}{name}.bias"] = shape[:1]
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Checkpoint:
    """A folder with one safetensors file, opened."""
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def parts(arrays: list[jax.Array], declared: list[Leaf]) -> list[tuple[np.ndarray, Parameter]]:
    """Every parameter, cut out of its leaf."""
    found = zip(arrays, declared, strict=True)
    return [(np.asarray(array)[..., leaf.columns(part)], part) for array, leaf in found for part in leaf.parts]


def layout_of(name: str, devices: int, config: ModelConfig) -> Layout:
    return make_layout(name, jax.devices()[:devices], config.hidden_size)


def load_all(checkpoint: Checkpoint, layout: Layout, dtype: str = "float32") -> list[jax.Array]:
    return load(checkpoint.source, checkpoint.rules, checkpoint.config, layout, dtype)


def write_and_load(folder: Path, config: dict[str, Any], tensors: Tensors) -> list[jax.Array]:
    checkpoint = write(folder, config, tensors)
    return load_all(checkpoint, layout_of("tensor", 2, checkpoint.config))


def by_hand(parameter: Parameter, tensors: Tensors) -> np.ndarray:
    """A padded parameter, row by row of its padded axes, from what transformers means by the tensor."""
    i, module, stem, kind = ("", "", "", *parameter.path.split("."))[-4:]
    layer = f"model.layers.{i}."
    outer = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.scale": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    letters = {"query": "q", "key": "k", "value": "v", "out": "o"}
    if parameter.path in outer:
        source = tensors[outer[parameter.path]]
    elif stem in norms:
        source = tensors[f"model.layers.{module}.{norms[stem]}.weight"]
    elif module == "attention":
        # The checkpoint's weights stand as [out, in], ours as [in, out]; .T leaves a bias as it is.
        source = tensors[f"{layer}self_attn.{letters[stem]}_proj.{kind}"].T
    else:
        source = tensors[f"{layer}mlp.{stem}_proj.{kind}"].T
    for dim, index in enumerate(parameter.indices):
        if index is not None:
            rows = [np.take(source, i, dim) if i != PAD else np.zeros_like(np.take(source, 0, dim)) for i in index]
            source = np.stack(rows, dim)
    return source


LAYOUTS = [
    *((name, n) for n in (1, 2, 3, 4, 8) for name in ("tensor", "replicated", "gathered")),
    *((f"{kind}-{a}x{b}", a * b) for kind in ("replicated", "gathered") for a, b in ((2, 2), (3, 2), (2, 4))),
]


@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (13, 1), (4, 4)])
@pytest.mark.parametrize(("name", "devices"), LAYOUTS)
def test_every_layout_holds_the_source_and_zeros(tmp_path: Path, name: str, devices: int, heads: int, kv_heads: int) -> None:
    values = BASE | {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    tensors = hf_tensors(values)
    checkpoint = write(tmp_path, values, tensors)
    layout = layout_of(name, devices, checkpoint.config)
    arrays, declared = load_all(checkpoint, layout), leaves(checkpoint.config, layout, "float32")
    assert [array.sharding for array in arrays] == [leaf.sharding for leaf in declared]
    specs = match_tensors(checkpoint.source, checkpoint.rules, checkpoint.config, layout, "float32")
    assert {tensor for spec in specs for tensor in spec.mapping.tensors} == set(tensors)
    for (array, parameter), spec in zip(parts(arrays, declared), specs, strict=True):
        assert parameter.path == spec.parameter.path
        np.testing.assert_array_equal(array, by_hand(parameter, tensors), err_msg=parameter.path)
        (tensor,), pattern = spec.mapping
        back = pattern.join([pattern.split(_unpadded(array, parameter), spec.sizes)])
        np.testing.assert_array_equal(back, tensors[tensor], err_msg=tensor)


@pytest.mark.parametrize(("name", "devices"), [("tensor", 3), ("gathered-2x2", 4)])
def test_what_is_multiplied_at_once_stands_together_on_each_device(tmp_path: Path, name: str, devices: int) -> None:
    """A device's columns of queries, then of keys, then of values; so the slices of one array, as one matrix's are."""
    checkpoint = write(tmp_path, BASE, hf_tensors(BASE))
    layout = layout_of(name, devices, checkpoint.config)
    found = {leaf.parts[0].path: leaf for leaf in leaves(checkpoint.config, layout, "float32")}
    leaf = found["blocks.0.attention.query.weight"]
    assert [part.path.split(".")[3] for part in leaf.parts] == ["query", "key", "value"]
    every = np.concatenate([leaf.columns(part) for part in leaf.parts])
    assert sorted(every) == list(range(leaf.shape[-1]))
    share = leaf.shape[-1] // layout.model
    for device in range(layout.model):
        own = range(device * share, (device + 1) * share)
        for part in leaf.parts:
            width = part.shape[-1] // layout.model
            here = leaf.columns(part)[device * width : (device + 1) * width]
            assert set(here) <= set(own) and list(here) == list(range(here[0], here[0] + width))


def _unpadded(array: np.ndarray, parameter: Parameter) -> np.ndarray:
    for dim, index in enumerate(parameter.indices):
        if index is not None:
            first = [int(np.flatnonzero(index == i)[0]) for i in range(index.max() + 1)]
            array = np.take(array, first, axis=dim)
    return array


def test_leaves_are_those_of_the_decoder(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, BASE, hf_tensors(BASE))
    layout = layout_of("tensor", 4, checkpoint.config)
    graph, state = nnx.split(Decoder(checkpoint.config, layout, "bfloat16"))
    arrays, declared = load_all(checkpoint, layout, "bfloat16"), leaves(checkpoint.config, layout, "bfloat16")
    assert [(x.shape, x.dtype) for x in arrays] == [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    decoder = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), arrays))
    at = {tuple(part.path for part in leaf.parts): array for leaf, array in zip(declared, arrays, strict=True)}
    mlp = decoder.blocks[1].mlp
    assert mlp is not None and at["blocks.1.mlp.down.weight",] is mlp.down.weight.get_value()
    assert at["blocks.1.mlp.gate.weight", "blocks.1.mlp.up.weight"] is mlp.gate_up.weight.get_value()
    assert at["embedding.weight",] is decoder.embedding.weight.get_value()


def test_sharded_safetensors_load_to_the_same_leaves(tmp_path: Path) -> None:
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    single.mkdir()
    sharded.mkdir()
    tensors = hf_tensors(BASE)
    one = write(single, BASE, tensors)
    write_sharded(sharded, BASE, tensors)
    layout = layout_of("tensor", 3, one.config)
    for a, b in zip(load_all(one, layout), load_all(open_checkpoint(sharded), layout), strict=True):
        np.testing.assert_array_equal(a, b)


def write_sharded(folder: Path, config: dict[str, Any], tensors: Tensors) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    files: dict[str, str] = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: x for name, x in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_arrive_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    tensors = hf_tensors(BASE, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    checkpoint = write(tmp_path, BASE | {"dtype": dtype}, tensors)
    assert checkpoint.config.dtype == dtype
    layout = layout_of("tensor", 2, checkpoint.config)
    for array, parameter in parts(load_all(checkpoint, layout, dtype), leaves(checkpoint.config, layout, dtype)):
        expected = by_hand(parameter, tensors)
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array.view(np.uint16), expected.view(np.uint16))


EVEN = BASE | {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


@pytest.mark.parametrize("name", ["tensor", "gathered"])
def test_a_quarter_of_the_devices_reads_a_quarter_of_the_bytes(tmp_path: Path, name: str) -> None:
    checkpoint = write(tmp_path, EVEN, hf_tensors(EVEN))
    layout = layout_of(name, 4, checkpoint.config)
    device = jax.devices()[2]
    specs = match_tensors(checkpoint.source, checkpoint.rules, checkpoint.config, layout, "float32")
    by_path = {spec.parameter.path: spec for spec in specs}
    for leaf in leaves(checkpoint.config, layout, "float32"):
        read_shard(leaf, by_path, leaf.sharding.devices_indices_map(leaf.shape)[device], np.dtype(np.float32))
    whole = sum(x.nbytes for x in hf_tensors(EVEN).values())
    norms = sum(x.nbytes for key, x in hf_tensors(EVEN).items() if "norm" in key)
    assert checkpoint.source.bytes_read == (whole - norms) // 4 + norms


@pytest.mark.parametrize("name", ["replicated", "replicated-2x2", "gathered-2x2", "tensor"])
def test_shards_that_devices_share_are_read_once(tmp_path: Path, name: str) -> None:
    checkpoint = write(tmp_path, EVEN, hf_tensors(EVEN))
    load_all(checkpoint, layout_of(name, 4, checkpoint.config))
    assert checkpoint.source.bytes_read == sum(x.nbytes for x in hf_tensors(EVEN).values())


def test_progress_counts_every_number_once(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, BASE, hf_tensors(BASE))
    layout, seen = layout_of("tensor", 2, checkpoint.config), []
    arrays = load(checkpoint.source, checkpoint.rules, checkpoint.config, layout, "float32", lambda *now: seen.append(now))
    total = sum(x.size for x in arrays)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}) and len(seen) == len(arrays)
    assert seen[-1] == (total, total) and {of for _, of in seen} == {total}


def test_a_checkpoint_of_transformers_loads(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**(BASE | {"hidden_size": 36}))).to(torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="8kB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    checkpoint = open_checkpoint(tmp_path)
    tensors = {name: x.numpy() for name, x in model.state_dict().items()}
    layout = layout_of("tensor", 4, checkpoint.config)
    for array, parameter in parts(load_all(checkpoint, layout), leaves(checkpoint.config, layout, "float32")):
        np.testing.assert_array_equal(array, by_hand(parameter, tensors))


Change = Callable[[Tensors], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks tensors model\.norm\.weight; fetch"),
        (lambda t: t.update({"model.extra": np.zeros(2)}), r"no use for: model\.extra; correct"),
        (lambda t: t.update({"model.norm.weight": np.zeros(3)}), r"model\.norm\.weight is \(3,\), not \(20,\)"),
        (lambda t: t.update({"model.norm.weight": np.zeros(20, np.int32)}), r"model\.norm\.weight is I32; supported"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(tmp_path: Path, change: Change, message: str) -> None:
    tensors = hf_tensors(BASE)
    change(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        write_and_load(tmp_path, BASE, tensors)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, BASE, {"model.norm.weight": np.zeros(20, np.float32)})
    with pytest.raises(CheckpointError, match=r"and \d+ more; fetch"):
        load_all(checkpoint, layout_of("tensor", 1, checkpoint.config))


def test_a_bias_the_config_does_not_mention_is_refused(tmp_path: Path) -> None:
    values = BASE | {"attention_bias": False}
    checkpoint = write(tmp_path, values, hf_tensors(BASE))
    with pytest.raises(CheckpointError, match=r"no use for: model\.layers\.0\.self_attn\.k_proj\.bias"):
        load_all(checkpoint, layout_of("tensor", 1, checkpoint.config))


def test_saved_rope_buffers_are_ignored(tmp_path: Path) -> None:
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.zeros(2, np.float32)}
    checkpoint = write(tmp_path, BASE, hf_tensors(BASE) | extra)
    load_all(checkpoint, layout_of("tensor", 1, checkpoint.config))


def test_a_tied_head_may_be_saved_again_but_not_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checkpoints.load._COMPARED", 100)  # several comparisons, the last of them short
    values = BASE | {"tie_word_embeddings": True}
    tensors = hf_tensors(values)
    head = tensors["model.embed_tokens.weight"].copy()
    checkpoint = write(tmp_path, values, tensors | {"lm_head.weight": head})
    layout = layout_of("tensor", 2, checkpoint.config)
    assert len(parts(load_all(checkpoint, layout), leaves(checkpoint.config, layout, "float32"))) == len(tensors)
    head[-1, -1] += 1
    checkpoint = write(tmp_path, values, tensors | {"lm_head.weight": head})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ; set"):
        load_all(checkpoint, layout)


def test_random_leaves_look_like_loaded_ones(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, BASE, hf_tensors(BASE))
    layout = layout_of("tensor", 4, checkpoint.config)
    loaded, made = load_all(checkpoint, layout, "bfloat16"), random_leaves(checkpoint.config, layout, "bfloat16", 0)
    for a, b in zip(loaded, made, strict=True):
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    for array, parameter in parts(made, leaves(checkpoint.config, layout, "bfloat16")):
        values = array.astype(np.float32)
        if parameter.path.endswith("norm.scale"):
            np.testing.assert_array_equal(values, 1)
        else:
            assert 0.01 < _unpadded(values, parameter).std() < 0.03, parameter.path
        for dim, index in enumerate(parameter.indices):
            if index is not None:
                assert not np.take(values, np.flatnonzero(index == PAD), axis=dim).any()
    other = random_leaves(checkpoint.config, layout, "bfloat16", 1)
    assert not jnp.array_equal(made[0], other[0]) and not jnp.array_equal(made[0], made[len(made) // 2])


def test_random_copies_of_a_kv_head_are_equal() -> None:
    config = ModelConfig(16, 8, 8, 1, 4, 1, 4, 32)
    layout = layout_of("tensor", 4, config)
    made = parts(random_leaves(config, layout, "float32", 0), leaves(config, layout, "float32"))
    heads = next(array for array, parameter in made if parameter.path == "blocks.0.attention.key.weight").reshape(8, 4, 4)
    np.testing.assert_array_equal(heads, np.broadcast_to(heads[:, :1], heads.shape))


def test_a_wrong_header_is_a_checkpoint_error(tmp_path: Path) -> None:
    write(tmp_path, BASE, hf_tensors(BASE))
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (b"", whole[:5], whole[:100], whole[:-7], struct.pack("<Q", 1 << 60) + whole[8:], b"x" * 64):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt .*; fetch it again"):
            open_checkpoint(tmp_path)


def test_a_name_that_is_there_twice_is_found_in_one_pass(tmp_path: Path) -> None:
    names = [f'"{i % 60_000}": "x"' for i in range(60_001)]
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {' + ", ".join(names) + "}}")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="is not an index"):
        SafetensorsSource(tmp_path)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("shape", [[0, 1 << 63], [1 << 62, 0], [0] * 70, [1] * 70])
def test_a_shape_that_no_array_has_is_refused(tmp_path: Path, shape: list[int]) -> None:
    header = {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 if all(shape) else 0]}}
    (tmp_path / "model.safetensors").write_bytes(
        safetensors_bytes(json.dumps(header).encode(), b"1234"[: 4 if all(shape) else 0])
    )
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor x has the shape .* which no array can have; fetch it"):
        SafetensorsSource(tmp_path)


def test_what_is_larger_than_any_header_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(b"{}".ljust((1 << 24) + 8), b""))
    with pytest.raises(CheckpointError, match="a header of 16777224 bytes"):
        SafetensorsSource(tmp_path)
    write_sharded(tmp_path, BASE, hf_tensors(BASE))
    (tmp_path / "model.safetensors").unlink()
    for name in ("model.safetensors.index.json", "config.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text + " " * (1 << 24))
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(tmp_path)
        (tmp_path / name).write_text(text)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_nested_deep_is_refused(tmp_path: Path, name: str) -> None:
    value = "[" * 100_000 + "]" * 100_000
    write(tmp_path, BASE, hf_tensors(BASE))
    (tmp_path / name).write_text('{"model_type": "llama", "eos_token_id": ' + value + "}")
    with pytest.raises(CheckpointError, match=name) as caught:
        open_checkpoint(tmp_path)
    assert str(caught.value).isprintable()


def test_a_file_without_tensors_says_no_dtype(tmp_path: Path) -> None:
    values = {key: value for key, value in BASE.items() if key != "dtype"}
    checkpoint = write(tmp_path, values, {})
    with pytest.raises(CheckpointError, match="lacks tensors"):
        load_all(checkpoint, layout_of("tensor", 1, checkpoint.config))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not an index"),
        ({"metadata": {}}, "is not an index"),
        ({"weight_map": [1]}, "is not an index"),
        ({"weight_map": {}}, "empty `weight_map`"),
        ({"weight_map": {"a": "gone.safetensors"}}, r"not there: gone\.safetensors; fetch"),
        ({"weight_map": {"a": "../x.safetensors"}}, r"tensor a is said to be in '\.\./x\.safetensors', outside"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside the folder"),
        ({"weight_map": {"a": ".."}}, "outside the folder"),
        ({"weight_map": {"a": "x" * 300}}, "not there: x+; fetch"),
        ({"weight_map": {"a": 1}}, "is not an index"),
        ('{"weight_map": {"a": "\\ud800\\n\\u001b[31m"}}', r"not there: \\ud800\\n\\x1b\[31m; fetch"),
        ({"weight_map": {"a" * 5000: "../x"}}, r"tensor a+ \.\.\. .*outside the folder; put"),
        ({"weight_map": {"absent": "model-0.safetensors"}}, r"model-0\.safetensors lacks absent"),
    ],
)
def test_a_wrong_index_is_a_checkpoint_error(tmp_path: Path, index: Any, message: str) -> None:
    write_sharded(tmp_path, BASE, hf_tensors(BASE))
    text = index if isinstance(index, str) else json.dumps(index)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsSource(tmp_path)


def test_a_folder_without_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json; give a folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(CheckpointError, match=r"has no config\.json; open m\.gguf in it"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json is not"):
            open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")


def test_reading_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, BASE, hf_tensors(BASE))
    with pytest.raises(CheckpointError, match="has no tensor nothing"):
        checkpoint.source.read("nothing", (slice(0, 1),))


def test_generation_config_adds_its_stop_ids_and_defaults(tmp_path: Path) -> None:
    write(tmp_path, BASE | {"eos_token_id": 5}, hf_tensors(BASE))
    generation = {"eos_token_id": [7, 5, 9], "temperature": 0.6, "top_p": None, "transformers_version": "5"}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.eos_token_ids == (5, 7, 9)
    assert checkpoint.generation_defaults == {"temperature": 0.6}
    assert checkpoint.tokenizer() is None


def test_weights_say_the_dtype_that_the_config_does_not(tmp_path: Path) -> None:
    values = {key: value for key, value in BASE.items() if key != "dtype"}
    checkpoint = write(tmp_path, values, hf_tensors(BASE, ml_dtypes.bfloat16))
    assert checkpoint.config.dtype == "bfloat16"
    assert replace(checkpoint.config, dtype="float32") == write(tmp_path, values, hf_tensors(BASE)).config
