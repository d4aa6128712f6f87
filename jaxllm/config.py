"""A model's architecture as data.

A family's reader (`checkpoints/families/`) turns a published config into a `ModelConfig`; everything after that (the decoder, the
cache, the cost of a run) reads only this. Its fields are mechanisms, each independent of the others, none of them a family's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

_SMALLEST = 1e-12  # of the numbers of a rotary embedding and of scales; the largest is one over it
_MOST_LAYERS = 1 << 12
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base and how it is stretched to longer contexts.

    `original_max_position` is the context the frequencies were trained for. The fields of llama3 (`low_freq_factor`,
    `high_freq_factor`), of yarn (`beta_*`, `truncate`), of yarn and longrope (`attention_factor`) and of longrope (`*_factors`,
    a divisor for each pair; the long ones are those of rows that exceed `original_max_position`) are read by those kinds alone.
    `fraction` of each head is turned, the first numbers of it.
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
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    fraction: float = 1.0

    def __post_init__(self) -> None:
        numbers = [(name, x) for name, value in vars(self).items() for x in (value if isinstance(value, tuple) else (value,))]
        for name, value in numbers:
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not _SMALLEST <= value <= 1 / _SMALLEST:
                raise ValueError(f"the rotary embedding's {name} is {value}; it must be {_SMALLEST} to {1 / _SMALLEST}")
        if self.theta == 1:
            raise ValueError("the rotary embedding's theta is 1, which turns all pairs alike")
        if self.fraction > 1:
            raise ValueError(f"the rotary embedding turns {self.fraction} of a head; it must be at most 1")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}")

    def rotary_dim(self, head_dim: int) -> int:
        """How many numbers of a head are turned."""
        return int(head_dim * self.fraction)


@dataclass(frozen=True)
class Experts:
    """Feed-forward blocks of which a router chooses `top_k` for each token (Shazeer et al. 2017).

    Attributes:
      size: the ffn's size of each.
      normalised: the chosen ones' weights sum to one, rather than all experts'.
      shared_size: the ffn's size of one that every token runs through as well, behind a gate of its own; 0: there is none.
    """

    count: int
    top_k: int
    size: int
    normalised: bool = True
    shared_size: int = 0


class Layer(NamedTuple):
    """What sets one layer apart from others of the model.

    Attributes:
      window: how many positions a query sees, its own included; None: all before it.
      rope: None: the layer knows no positions.
      routed: it has experts.
      attention_scale: what the products of queries and keys are multiplied by.
    """

    window: int | None
    rope: RopeConfig | None
    routed: bool
    attention_scale: float


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Sizes are those of the checkpoint; padding to a mesh is `sharding.padding`'s.

    Attributes:
      tied_head: there is no table of the head's own: it is the embedding.
      labels: of a classifier in the place of the head; 0: there is no head at all; None: a language model.
      norm: "rms", rounded to the model's dtype before its scale; "rms_float32", rounded after it; "layer" (Ba et al. 2016).
      norm_offset: added to the scales of norms.
      norm_affine: norms have scales, and layer norms biases.
      norm_place: of a norm and each half f of a block: "before", x + f(norm(x)); "after", x + norm(f(x)); "around", both;
        "sum", norm(x + f(x)).
      final_norm: a norm before the head.
      parallel: both halves of a block read the same x, and their results are added to it.
      gated_mlp: down(act(gate(x)) * up(x)); otherwise down(act(up(x))).
      rope: of every layer; None: of none.
      local_rope: of layers with a window, where theirs is another.
      windows, roped, routed: of each layer, a pattern that repeats; see `layer`.
      learned_positions: rows of a table that is added to the embedding, position p at row p + `position_offset`; 0: no table.
      embed_size: of the tables, where a projection stands between them and the decoder; 0: the hidden size.
      qk_norm: "head": of each query and key head; "all": of all query heads together, and all key heads.
      attention_scale: of the scores; None: head_dim ** -0.5.
      scale_by_depth: the scores of layer i, counted from 0, are divided by i + 1 besides.
      attention_cap, logit_cap: c: scores, or logits, x become c * tanh(x / c); 0: none.
      embedding_scale, residual_scale, logit_scale: what embeddings, each half of a block, and logits are multiplied by.
    """

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
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    tied_head: bool = False
    labels: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    norm: Literal["rms", "rms_float32", "layer"] = "rms"
    norm_offset: float = 0.0
    norm_affine: bool = True
    norm_place: Literal["before", "after", "around", "sum"] = "before"
    final_norm: bool = True
    parallel: bool = False
    gated_mlp: bool = True
    local_rope: RopeConfig | None = None
    windows: tuple[int | None, ...] = (None,)
    roped: tuple[bool, ...] = (True,)
    experts: Experts | None = None
    routed: tuple[bool, ...] = (True,)
    learned_positions: int = 0
    position_offset: int = 0
    embed_size: int = 0
    qk_norm: Literal["head", "all"] | None = None
    attention_scale: float | None = None
    scale_by_depth: bool = False
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

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
        if self.experts and self.experts.top_k > self.experts.count:
            raise ValueError(f"of {self.experts.count} experts a token cannot choose {self.experts.top_k}")
        scales = {"attention_scale": self.attention_scale, "logit_scale": self.logit_scale, "residual_scale": self.residual_scale,
                  "embedding_scale": self.embedding_scale}  # fmt: skip
        for name, scale in scales.items():
            if scale is not None and not _SMALLEST <= scale <= 1 / _SMALLEST:
                raise ValueError(f"{name} is {scale}; it must be {_SMALLEST} to {1 / _SMALLEST}")
        if self.parallel and self.norm_place != "before":
            raise ValueError(f"halves of a block that read the same state have norms before them, not {self.norm_place!r}")
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                _check_rope(rope, self.head_dim)

    def layer(self, i: int) -> Layer:
        """The i-th, counted from 0."""
        window, roped = (pattern[i % len(pattern)] for pattern in (self.windows, self.roped))
        rope = self.local_rope if window is not None and self.local_rope is not None else self.rope
        routed = self.experts is not None and self.routed[i % len(self.routed)]
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return Layer(window, rope if roped else None, routed, scale / (i + 1) if self.scale_by_depth else scale)

    @property
    def short_context(self) -> int | None:
        """The longest row that longrope turns by its short factors; beyond it all of the row is turned otherwise."""
        ropes = [rope for rope in (self.rope, self.local_rope) if rope is not None and rope.kind == "longrope"]
        return min((rope.original_max_position for rope in ropes), default=None)

    @property
    def keys_depend_on_length(self) -> bool:
        """Is a token's key turned by how long its row is, and not by its position alone?"""
        return any(rope is not None and rope.kind == "dynamic" for rope in (self.rope, self.local_rope))

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Of the whole model, in order."""
        return tuple(self.layer(i) for i in range(self.num_layers))

    @property
    def attention_params(self) -> int:
        """Parameters of a block's attention."""
        query, key = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        biases = self.qkv_bias * (query + 2 * key) + self.out_bias * self.hidden_size
        norms = {None: 0, "head": 2 * self.head_dim, "all": query + key}[self.qk_norm]
        return self.hidden_size * (2 * query + 2 * key) + biases + self.norm_affine * norms

    def ffn_params(self, routed: bool, experts: int | None = None) -> int:
        """Parameters of a block's feed-forward half; with so many of its experts, or all."""
        if not (routed and self.experts):
            return self._mlp(self.intermediate_size, self.mlp_bias)
        shared = self._mlp(self.experts.shared_size) + self.hidden_size if self.experts.shared_size else 0
        count = self.experts.count if experts is None else experts
        return count * self._mlp(self.experts.size) + shared + self.hidden_size * self.experts.count

    def _mlp(self, size: int, bias: bool = False) -> int:
        inner = 1 + self.gated_mlp
        return (inner + 1) * self.hidden_size * size + bias * (inner * size + self.hidden_size)

    @property
    def layer_params(self) -> int:
        """Parameters of one block; on average, where they differ."""
        return self._layers_params() // self.num_layers

    def _layers_params(self, experts: int | None = None) -> int:
        norms = (4 if self.norm_place == "around" else 2) * self._norm
        ffn = sum(self.ffn_params(layer.routed, experts) for layer in self.layers)
        return self.num_layers * (self.attention_params + norms) + ffn

    def params_read(self, experts: int) -> int:
        """Parameters that a step reads where so many experts of each layer are chosen, the head's table among them."""
        return self._layers_params(experts) + self.vocab_size * self.table_size

    @property
    def _norm(self) -> int:
        return self.norm_affine * self.hidden_size * (2 if self.norm == "layer" else 1)

    @property
    def table_size(self) -> int:
        """Numbers of a token in the embedding and in the head."""
        return self.embed_size or self.hidden_size

    @property
    def num_tables(self) -> int:
        """The embedding, and a head of its own."""
        return 1 if self.tied_head else 2

    @property
    def num_params(self) -> int:
        """Parameters of the whole model; a tied head counts once."""
        tables = self.num_tables * self.vocab_size * self.table_size + self.learned_positions * self.hidden_size
        projections = 2 * self.embed_size * self.hidden_size
        classifier = (self.labels or 0) * self.table_size
        return self._layers_params() + tables + projections + classifier + self.final_norm * self._norm

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token leaves in the cache, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * itemsize

    def flops_per_token(self, context: int) -> int:
        """FLOPs (2 a multiply-add) to run one token whose attention reads `context` positions, LM head included."""
        matmul = self.params_read(self.experts.top_k if self.experts else 0)
        attention = 2 * self.num_layers * self.num_heads * self.head_dim * context
        return 2 * (matmul + attention)


def _check_rope(rope: RopeConfig, head_dim: int) -> None:
    turned = rope.rotary_dim(head_dim)
    if turned % 2 or not turned:
        raise ValueError(f"head size {head_dim}: rotary embeddings turn pairs, and {turned} of its numbers are none")
    factors = {len(rope.short_factors), len(rope.long_factors)}
    if factors != ({turned // 2} if rope.kind == "longrope" else {0}):
        raise ValueError(f"longrope needs a short and a long factor for each of {turned // 2} pairs; there are {sorted(factors)}")
