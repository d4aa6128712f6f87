"""A tiny random LLaMA as a folder of config.json and safetensors, written with numpy alone. It has no tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 1280,
    "bos_token_id": 1,
    "eos_token_id": [],
    "dtype": "float32",
}


def write_tiny(folder: Path, **changes: Any) -> Path:
    """`folder`, with a checkpoint of CONFIG and these changes in it; logits are a few units apart."""
    config = CONFIG | changes
    d, f, v, h = config["hidden_size"], config["intermediate_size"], config["vocab_size"], config["head_dim"]
    n, k = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d)}
    norms = ["model.norm.weight"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        norms += [f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight"]
        attention = {"q": (n, d), "k": (k, d), "v": (k, d), "o": (d, n)}
        shapes |= {f"{layer}self_attn.{x}_proj.weight": shape for x, shape in attention.items()}
        shapes |= {f"{layer}mlp.{x}_proj.weight": (f, d) for x in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (d, f)
    rng = np.random.default_rng(0)
    tensors = {name: (2 * rng.standard_normal(shape) / shape[1] ** 0.5).astype(np.float32) for name, shape in shapes.items()}
    tensors |= {name: (1 + 0.3 * rng.standard_normal(d)).astype(np.float32) for name in norms}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tokenizer(folder: Path) -> Path:
    """Gives `folder` a tokenizer of 256 bytes, then <s> and </s>: 258 ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in bytes_to_unicode().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    return folder


def write_tiny_with_tokenizer(folder: Path) -> Path:
    """A checkpoint that takes texts of up to 256 bytes."""
    sizes = {"vocab_size": 258, "max_position_embeddings": 256, "bos_token_id": 256, "eos_token_id": 257}
    return write_tokenizer(write_tiny(folder, **sizes))
