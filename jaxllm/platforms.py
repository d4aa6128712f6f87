"""What is done differently for XLA's compilers for CPUs, GPUs and TPUs: each choice once, with its reason. Plain Python.

XLA's own options for a program are in `execution/steps.py`; what is known of a GPU's generation, in `sharding/layout.py`.
"""

from __future__ import annotations

import math
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
      rounds_within_products: ask for a product in 16 bits where its sum is rounded at once: XLA for GPUs would write it in
        float32 and round it in a kernel of its own. On a CPU it multiplies in float32 then.
      float32_convolutions: multiply float32 rows with a weight as a convolution of width one. XLA's CPU compiler makes a plain
        product of it, by Eigen's kernels, where it gives products to a library that takes a quarter longer for few rows and adds
        up in one go. In some models a few inputs are a thousand times larger than the others (Sun et al. 2024, massive
        activations), and all that is added after them is rounded to their precision; Eigen adds blocks. A single row has no
        blocks: its sum over the ffn is taken in parts, which halves the error of SmolLM2's logits.
      float32_cache: keep keys and values in float32 whatever the model's dtype: XLA has no 16-bit update in place on a CPU and
        would convert all of the cache, twice, for every token.
      loops_over_tiles: attention goes over pages or pairs of tiles in a loop whose length is data, and the cache is written row
        by row. Elsewhere each pass would wait for the host.
      turned_keys: pages of keys are written and read as [PAGE, H]. So XLA lays them out on a TPU, where 64 positions fill half a
        tile; for [H, PAGE] it would copy the keys of all layers before and after each call, to a form of twice the size.
      hides_writes: write a single row in a loop of one pass, which XLA does not know: it would make no scatter of it, fuse the
        write into each read, and copy the cache for it.
      token_rungs: tokens of the prefill steps' programs on each data shard, below the most that a step takes.
      step_tokens: tokens of prompts that cost what a step costs beside its tokens, the reading of the weights most of all.
      row_rungs: rows of the decode steps' programs on each data shard, below the most sequences.
      width_rungs: pages that the programs' attention reaches, below those of the longest sequence; loops need none.
      typical_length: tokens of a sequence, on average, that the cache is made for: a host's memory is not ours alone. None: as
        many as fit.
      drops_barriers: XLA takes optimization barriers out before it fuses: what is to be computed once stands in a branch.
      tables_as_integers: look tables of 16-bit floats up as integers: of floats XLA's CPU compiler makes a float32 copy in every
        call. To a TPU the integers are the copy.
      few_experts: how the experts of a few tokens run, "one by one" or "with own weights"; see `decoder/moe.py`.
      grouped_products: `jax.lax.ragged_dot` multiplies each token by its own expert alone; elsewhere XLA multiplies it by all.
      one_round: up to so many tokens each expert has a seat for every token: a GPU is busy reading weights then, and a loop would
        wait for the host in every layer.
    """

    scoring_row: int = 16384
    fewest_rows: int = 1
    rounds_within_products: bool = False
    float32_convolutions: bool = False
    float32_cache: bool = False
    loops_over_tiles: bool = False
    turned_keys: bool = False
    hides_writes: bool = False
    token_rungs: tuple[int, ...] = (64, 256)
    step_tokens: int = 256
    row_rungs: tuple[int, ...] = (1, 8, 64)
    width_rungs: tuple[int, ...] = (8, 32, 128, 512)
    typical_length: int | None = None
    drops_barriers: bool = False
    tables_as_integers: bool = True
    few_experts: str = "with own weights"
    grouped_products: bool = False
    one_round: int = 0


CPU = Choices(
    scoring_row=2048,
    fewest_rows=4,
    float32_convolutions=True,
    float32_cache=True,
    loops_over_tiles=True,
    token_rungs=(32, 64, 128, 256, 512),
    step_tokens=32,
    row_rungs=(1, 4, 8, 16, 32, 64, 128, 256),
    typical_length=512,
    drops_barriers=True,
    few_experts="one by one",
)
GPU = Choices(fewest_rows=2, rounds_within_products=True, one_round=128)
TPU = Choices(turned_keys=True, hides_writes=True, tables_as_integers=False, grouped_products=True)


def choices(platform: str) -> Choices:
    """The choices for jax's name of a platform: "cpu", "gpu" or "tpu"."""
    return {"cpu": CPU, "gpu": GPU, "tpu": TPU}[platform]


LOOPS, PASSES, KERNELS = "loops", "passes", "kernels"
TRITON = 8.0  # the compute capability of the first GPUs that have it, Ampere
SMALLEST_HEAD, LARGEST_HEAD = 16, 256  # of a kernel


def attention_form(platform: str, capability: float, dtype: str, head_dim: int) -> str:
    """How attention goes through the keys.

    LOOPS: over those that are there. PASSES: all rows over as many as a program is compiled for, where loops would wait for the
    host. KERNELS: our own (`decoder/attention_kernels.py`), for 16 bits and heads of a power of two: Triton takes minutes to
    compile float32's exact products. `capability`: NVIDIA's, infinite of other devices.
    """
    if choices(platform).loops_over_tiles:
        return LOOPS
    fits = SMALLEST_HEAD <= head_dim <= LARGEST_HEAD and head_dim & (head_dim - 1) == 0
    return KERNELS if TRITON <= capability < math.inf and dtype != "float32" and fits else PASSES
