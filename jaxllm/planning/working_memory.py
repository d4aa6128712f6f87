"""About the bytes that a step needs on each device beside weights and cache: those that its largest stage holds at once.

Read from programs that XLA has compiled. On CPUs within a tenth; on GPUs rather more than they take.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxllm.buckets import MAX_STEP_TOKENS, PAGE, TILE, pages_of
from jaxllm.config import ModelConfig
from jaxllm.decoder.moe import products
from jaxllm.decoder.paged_attention import PASS_BYTES
from jaxllm.execution.loglikelihood import CHUNK
from jaxllm.platforms import CPU, choices
from sharding.layout import AMPERE, HOPPER, Layout
from sharding.padding import pad_heads, round_up


def step_bytes(config: ModelConfig, layout: Layout, dtype: str, rows: int, length: int) -> int:
    """Bytes of a generating step: the larger of prefill and decode."""
    sizes, rows = _Sizes(config, layout, dtype), -(-rows // layout.data)
    if layout.platform == "cpu":
        return max(sizes.cpu_decode(rows), sizes.cpu_prefill(MAX_STEP_TOKENS))
    return max(sizes.decode(rows), sizes.prefill(MAX_STEP_TOKENS, length))


def score_bytes(config: ModelConfig, layout: Layout, dtype: str) -> int:
    """Bytes of a scoring step: an ffn's activations, residuals, and the weights gathered meanwhile."""
    sizes, tokens = _Sizes(config, layout, dtype), choices(layout.platform).scoring_row
    if layout.platform == "cpu":
        return sizes.cpu_score(tokens)
    # GPUs before Ampere have no Triton kernels, and the ffn's products stay in float32.
    ffn = tokens * (9 if layout.capability < AMPERE else 4 + (not config.gated_mlp)) * sizes.ffn
    activations = max(ffn, sizes.experts(tokens)) + tokens * 6 * config.hidden_size
    if not layout.gathers:
        return activations
    if config.experts:  # of this layer and the next
        return activations + sizes.gathered()
    matrices, table = (1 + config.gated_mlp) * sizes.matrix, sizes.table
    return activations + (matrices + table if config.tied_head else max(matrices, table))


class _Sizes:
    """Sizes of a device's shard, padded."""

    def __init__(self, config: ModelConfig, layout: Layout, dtype: str):
        self.config, self.layout = config, layout
        self.size = jnp.dtype(dtype).itemsize
        self.embed = config.hidden_size
        heads = pad_heads(config.num_heads, config.num_kv_heads, layout.divisor)
        self.keys = heads.slots // layout.model * config.head_dim
        self.queries = self.keys * heads.group
        self.ffn = round_up(config.intermediate_size, layout.divisor) // layout.model
        self.vocab = round_up(config.vocab_size, layout.divisor) // layout.model
        self.table = self.vocab * config.table_size * self.size if layout.gathers else 0
        self.tables = self.table * config.num_tables
        self.matrix = self.ffn * self.embed * self.size if layout.gathers else 0

    def gathered(self) -> int:
        """Bytes of gathered weights that a GPU holds at once: two layers and the tables; before Hopper one matrix."""
        if not self.layout.gathers:
            return 0
        if self.layout.capability < HOPPER:
            return max(self.table, self.matrix)
        return 2 * self.config.layer_params * self.size // self.layout.model + self.tables

    def experts(self, tokens: int) -> int:
        """Bytes of a round of experts: their inputs, products and sums, and all pairs' results."""
        experts = self.config.experts
        if experts is None:
            return 0
        count, rows = products(experts, self.layout.platform, tokens)
        width = max(self.embed, round_up(experts.size, self.layout.divisor) // self.layout.model)
        return self.size * (2 * count * rows * width + tokens * experts.top_k * self.embed)

    def decode(self, rows: int) -> int:
        """Bytes of decoding on a GPU: its attention reads the pages where they lie."""
        return self.gathered() + max(self._sampled(rows), self.experts(rows))

    def prefill(self, tokens: int, length: int) -> int:
        """Bytes of a prefill step on a GPU, each of whose tiles may end a prompt."""
        layer = tokens * self.embed * self.size + self._passes(tokens, length) + max(tokens * 4 * self.ffn, self.experts(tokens))
        return self.gathered() + max(layer, self._sampled(tokens // TILE))

    def _passes(self, tokens: int, length: int) -> int:
        """Bytes of attention over pages: those of a pass, its scores, queries, and results as they were and as they are."""
        page = 2 * tokens // TILE * self.keys * PAGE * self.size
        width = max(min(PASS_BYTES // page, pages_of(length)), 1)
        scores = tokens * self.queries // self.config.head_dim * PAGE * (4 + self.size)
        return width * (page + scores) + tokens * self.queries * (2 * 4 + self.size)

    def _sampled(self, rows: int) -> int:
        """Bytes of logits as they come, and of what sampling makes of them."""
        return 3 * rows * self.config.vocab_size * 4

    def cpu_decode(self, rows: int) -> int:
        """Bytes of decoding: logits; in a gathered layout the tables, gathered before the loop, a layer and one more matrix."""
        layer = self.config.layer_params * self.size // self.layout.model if self.layout.gathers else 0
        return self._logits(rows) + self.tables + max(layer + self.matrix, self._converted())

    def cpu_prefill(self, tokens: int) -> int:
        """Bytes of a step's tiles, each of which may end a prompt."""
        ends = tokens // TILE
        # The scheduler of gathered layouts, which saves memory, holds the logits once.
        logits = 4 * ends * self.vocab if self.layout.gathers else self._logits(ends)
        # Queries and results, keys, values and what is written of either are float32, as the cache.
        attention = tokens * (4 * (2 * self.queries + 3 * self.keys) + self.size * self.embed)
        return self._cpu(max(self._ffn(tokens), attention), tokens, logits)

    def cpu_score(self, tokens: int) -> int:
        # The scheduler of gathered layouts, which saves memory, holds one array of logits less.
        logits = (2 if self.layout.gathers else 3) * CHUNK * self.vocab * 4
        return self._cpu(self._ffn(tokens), tokens, logits + 4 * tokens * self.embed)

    def _cpu(self, layer: int, tokens: int, head: int) -> int:
        """The largest of the embedding's, a layer's and the head's bytes. A tied table is held in between."""
        kept = self.table if self.config.tied_head else 0
        residual = tokens * self.embed * self.size
        return max(self.table + self._converted() + residual, kept + layer + self.matrix, self.table + max(head, residual))

    def _logits(self, rows: int) -> int:
        """Bytes of the logits, as a device makes them and whole."""
        made = CPU.fewest_rows * self.vocab if self.size == 2 else 0
        return 4 * (max(made, rows * self.config.vocab_size) + rows * self.config.vocab_size)

    def _converted(self) -> int:
        """Bytes of a table as float32: so XLA gathers 16-bit numbers on a CPU."""
        return 2 * self.table if self.size == 2 else 0

    def _ffn(self, tokens: int) -> int:
        """Bytes of a layer's ffn for so many tokens: inputs, products, and their sum over the devices."""
        if self.config.experts:
            return self.experts(tokens)
        summed = self.layout.model > 1
        if self.size == 2:  # products are float32, and rounded
            return tokens * max(10 * self.ffn + 2 * self.embed, summed * (10 * self.embed + 2 * self.ffn))
        return 4 * tokens * max(self.embed + 3 * self.ffn, 2 * self.embed + 2 * self.ffn)
