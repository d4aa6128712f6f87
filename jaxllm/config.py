"""A model's architecture as data.

A family's reader (`checkpoints/families/`) turns a published config into a `ModelConfig`; everything after that (the decoder, the
cache, the cost of a run) reads only this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

_SMALLEST = 1e-12  # of the numbers of a rotary embedding; the largest is one over it
_MOST_LAYERS = 1 << 12
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base and how it is stretched to longer contexts.

    `original_max_position` is the context the frequencies were trained for. The fields of llama3 (`low_freq_factor`,
    `high_freq_factor`) and of yarn (`beta_*`, `attention_factor`, `truncate`) are read by those kinds alone.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not _SMALLEST <= value <= 1 / _SMALLEST:
                raise ValueError(f"the rotary embedding's {name} is {value}; it must be {_SMALLEST} to {1 / _SMALLEST}")
        if self.theta == 1:
            raise ValueError("the rotary embedding's theta is 1, which turns all pairs alike")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are those of the checkpoint; padding to a mesh is `sharding.padding`'s."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    rope: RopeConfig = field(default_factory=RopeConfig)
    tied_head: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        if none := [name for name in sizes if getattr(self, name) < 1]:
            raise ValueError(f"{none[0]} is {getattr(self, none[0])}; it must be at least 1")
        if self.num_layers > _MOST_LAYERS:  # before anything is made for each
            raise ValueError(f"{self.num_layers} layers are more than {_MOST_LAYERS}")
        if not 0 <= self.norm_eps < 1:
            raise ValueError(f"norm_eps is {self.norm_eps}; it must be at least 0 and below 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim} is odd; rotary embeddings turn pairs")

    @property
    def layer_params(self) -> int:
        """Parameters of one block."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention = self.hidden_size * (qkv + self.num_heads * self.head_dim)
        attention += self.attention_bias * (qkv + self.hidden_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        return attention + mlp + 2 * self.hidden_size

    @property
    def num_params(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        tables = self.num_tables * self.vocab_size * self.hidden_size
        return self.num_layers * self.layer_params + tables + self.hidden_size

    @property
    def num_tables(self) -> int:
        """The embedding, and a head of its own."""
        return 1 if self.tied_head else 2

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token leaves in the cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    def flops_per_token(self, context: int) -> int:
        """FLOPs (2 a multiply-add) to run one token whose attention reads `context` positions, LM head included."""
        matmul = self.num_layers * self.layer_params + self.vocab_size * self.hidden_size
        attention = 2 * self.num_layers * self.num_heads * self.head_dim * context
        return 2 * (matmul + attention)


# Published shapes, for planning and for benches with random weights.
PRESETS = {
    "llama-7b": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, 2048, dtype="float16", bos_token_id=1, eos_token_ids=(2,)),
    "llama-30b": ModelConfig(32000, 6656, 17920, 60, 52, 52, 128, 2048, dtype="float16", bos_token_id=1, eos_token_ids=(2,)),
    "llama-3-8b": ModelConfig(
        128256, 4096, 14336, 32, 32, 8, 128, 8192, norm_eps=1e-5, dtype="bfloat16", bos_token_id=128000, eos_token_ids=(128001,),
        rope=RopeConfig(theta=500000.0),
    ),
    "llama-3-70b": ModelConfig(
        128256, 8192, 28672, 80, 64, 8, 128, 8192, norm_eps=1e-5, dtype="bfloat16", bos_token_id=128000, eos_token_ids=(128001,),
        rope=RopeConfig(theta=500000.0),
    ),
    "smollm2-135m": ModelConfig(
        49152, 576, 1536, 30, 9, 3, 64, 8192, norm_eps=1e-5, tied_head=True, dtype="bfloat16", bos_token_id=1, eos_token_ids=(2,),
        rope=RopeConfig(theta=100000.0),
    ),
}  # fmt: skip
