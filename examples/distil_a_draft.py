"""A draft of every other layer learns to say what the whole model says, with optax; jaxllm evaluates it between steps.

python examples/distil_a_draft.py [MODEL]
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from safetensors.numpy import load_file

from jaxllm import LLM, SamplingParams

TEXTS = ["The cat sat on the mat and looked at the dog.", "Rain fell all night, and in the morning the river was high."]
HELD_OUT = ("The dog looked at", " the cat.")

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m", dtype="float32")
folder = Path(tempfile.mkdtemp()) / "teacher"
llm.save(folder, to="safetensors")  # a LLaMA's weights, by Hugging Face's names
config = json.loads((folder / "config.json").read_text())
teacher = {name: jnp.asarray(x) for name, x in load_file(folder / "model.safetensors").items()}
heads, base, eps = config["num_attention_heads"], config.get("rope_theta", 10000.0), config.get("rms_norm_eps", 1e-6)


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def rope(x: jax.Array) -> jax.Array:  # [B, T, N, H]
    angles = jnp.arange(x.shape[1])[:, None, None] / base ** (jnp.arange(0, x.shape[3], 2) / x.shape[3])
    (a, b), cos, sin = jnp.split(x, 2, -1), jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def logits(w: dict[str, jax.Array], ids: jax.Array, layers: int) -> jax.Array:  # ids [B, T] -> [B, T, V]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(layers):
        p = {n.split(".", 3)[3]: m.T for n, m in w.items() if n.startswith(f"model.layers.{i}.")}
        size = p["self_attn.q_proj.weight"].shape[1] // heads
        h = norm(x, p["input_layernorm.weight"])
        q, k, v = ((h @ p[f"self_attn.{n}_proj.weight"]).reshape(*ids.shape, -1, size) for n in "qkv")
        y = jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + y.reshape(*ids.shape, -1) @ p["self_attn.o_proj.weight"]
        h = norm(x, p["post_attention_layernorm.weight"])
        x = x + (jax.nn.silu(h @ p["mlp.gate_proj.weight"]) * (h @ p["mlp.up_proj.weight"])) @ p["mlp.down_proj.weight"]
    return norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


layers = config["num_hidden_layers"]
kept = range(0, layers, 2)
draft = {name: x for name, x in teacher.items() if not name.startswith("model.layers.")}
for new, old in enumerate(kept):
    draft |= {n.replace(f".{old}.", f".{new}.", 1): x for n, x in teacher.items() if n.startswith(f"model.layers.{old}.")}

batches = [jnp.array([llm.get_tokenizer()(text)["input_ids"]]) for text in TEXTS]
answers = [jax.nn.softmax(logits(teacher, ids, layers)) for ids in batches]
optimiser = optax.adamw(1e-4)
state = optimiser.init(draft)


@jax.jit
def step(draft: dict[str, jax.Array], state: Any, ids: jax.Array, wanted: jax.Array) -> tuple[Any, Any, jax.Array]:
    def loss(w: dict[str, jax.Array]) -> jax.Array:
        return optax.softmax_cross_entropy(logits(w, ids, len(kept)), wanted).mean()

    value, gradients = jax.value_and_grad(loss)(draft)
    updates, state = optimiser.update(gradients, state, draft)
    return optax.apply_updates(draft, updates), state, value


student = LLM.from_arrays(config | {"num_hidden_layers": len(kept)}, draft, tokenizer=llm.get_tokenizer())
for epoch in range(3):
    for ids, wanted in zip(batches, answers, strict=True):
        draft, state, value = step(draft, state, ids, wanted)
    student.update_weights(draft)
    [[held_out]] = student.score([(HELD_OUT[0], [HELD_OUT[1]])])
    print(f"epoch {epoch}: loss {value:.3f}, held-out log-probability {held_out.logprob:.2f}")
[output] = student.generate(HELD_OUT[0], SamplingParams(temperature=0, max_tokens=8))
print(f"the draft goes on: {output.outputs[0].text!r}")
