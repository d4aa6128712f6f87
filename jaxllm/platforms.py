"""What is done differently for XLA's compilers for CPUs, GPUs and TPUs: each choice once, with its reason. Plain Python.

XLA's own options for a program are in `execution/steps.py`; what is known of a GPU's generation, in `sharding/layout.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choices:
    """The choices for one platform.

    Attributes:
      scoring_row: tokens of a row in a scoring step: few on a CPU, whose cache holds their activations; elsewhere enough to hide
        transfers behind compute.
      fewest_rows: rows of 16 bits that a product with a weight is given at least. On a CPU XLA multiplies a single row ten times
        slower than four. On GPUs a single row is no matrix product to it: before Ampere it converts the whole weight to float32,
        on later ones it writes the float32 terms of smaller weights to memory.
      sum_splits: partial sums of a float32 product over the ffn. XLA's CPU compiler adds such products one after another. In some
        models a few inputs are a thousand times larger than the others (Sun et al. 2024, massive activations), and all that is
        added after them is rounded to their precision. Eight shorter sums halve the error of SmolLM2's logits.
      float32_cache: keep keys and values in float32 whatever the model's dtype: XLA has no 16-bit update in place on a CPU and
        would convert all of the cache, twice, for every token.
      loops_over_tiles: attention goes over blocks or pairs of tiles in a loop whose length is data. Five times faster on a CPU
        for a chunk in a cache twice its length; elsewhere each pass would wait for the host.
      hides_writes: write a cache of one row in a loop of one pass, which XLA does not know: it would fuse the write into each
        read, and copy the cache for it.
      square_caches: a cache may have as many rows on a device as blocks: XLA for GPUs keeps the values of all layers a second
        time then, in another order.
      blocks_first: of a single query a KV head, the values' product has the blocks as its first dimension: on a GPU XLA makes no
        matrix product of it, and otherwise copies the values to another order.
      tables_as_integers: look tables of 16-bit floats up as integers: of floats XLA's CPU compiler makes a float32 copy in every
        call. To a TPU the integers are the copy.
      few_experts: how the experts of a few tokens run, "one by one" or "with own weights"; see `decoder/moe.py`.
      grouped_products: `jax.lax.ragged_dot` multiplies each token by its own expert alone; elsewhere XLA multiplies it by all.
      one_round: up to so many tokens each expert has a seat for every token: a GPU is busy reading weights then, and a loop would
        wait for the host in every layer.
    """

    scoring_row: int = 16384
    fewest_rows: int = 1
    sum_splits: int = 1
    float32_cache: bool = False
    loops_over_tiles: bool = False
    hides_writes: bool = False
    square_caches: bool = True
    blocks_first: bool = False
    tables_as_integers: bool = True
    few_experts: str = "with own weights"
    grouped_products: bool = False
    one_round: int = 0


CPU = Choices(
    scoring_row=2048,
    fewest_rows=4,
    sum_splits=8,
    float32_cache=True,
    loops_over_tiles=True,
    hides_writes=True,
    few_experts="one by one",
)
GPU = Choices(fewest_rows=2, square_caches=False, blocks_first=True, one_round=128)
TPU = Choices(tables_as_integers=False, grouped_products=True)


def choices(platform: str) -> Choices:
    """The choices for jax's name of a platform: "cpu", "gpu" or "tpu"."""
    return {"cpu": CPU, "gpu": GPU, "tpu": TPU}[platform]
