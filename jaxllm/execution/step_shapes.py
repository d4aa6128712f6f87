"""The ladder of shapes that generating steps are compiled for. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.buckets import MAX_STEP_TOKENS, PAGE, TILE, pages_of
from jaxllm.platforms import KERNELS, choices
from sharding.padding import round_up


@dataclass(frozen=True)
class StepShapes:
    """The shapes that generating steps have, each ladder ascending: as many programs as there are pairs of them.

    Attributes:
      tokens: of a prefill step on each data shard, multiples of TILE.
      rows: of a decode step on each data shard.
      widths: pages of a sequence that a step's attention may reach.
      step_tokens: tokens that cost what a step does beside its tokens.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    widths: tuple[int, ...]
    step_tokens: int = 0

    @classmethod
    def of(
        cls,
        platform: str,
        max_model_len: int,
        rows: int,
        max_step_tokens: int = MAX_STEP_TOKENS,
        *,
        attention: str | None = None,
        batch_invariant: bool = False,
    ) -> StepShapes:
        """The ladders for sequences up to `max_model_len`, `rows` of them and `max_step_tokens` on each data shard.

        `attention`: its form, see `attention_form`; None: that in plain XLA. `batch_invariant`: one shape for all: a product's
        sums may be made in another order with another number of rows.
        """
        here = choices(platform)
        most = round_up(max_step_tokens, TILE)
        if batch_invariant:
            return cls((most,), (rows,), (pages_of(max_model_len),))
        tokens = tuple(n for n in here.token_rungs if n < most)
        width = pages_of(max_model_len)
        widths = () if here.loops_over_tiles or attention == KERNELS else tuple(n for n in here.width_rungs if n < width)
        return cls((*tokens, most), (*(n for n in here.row_rungs if n < rows), rows), (*widths, width), here.step_tokens)

    def tokens_for(self, tokens: int) -> int:
        """Tokens of the step that takes `tokens`, or the first of them where two steps cost less."""
        above = self._rung(tokens)
        below = max((n for n in self.tokens if n <= tokens), default=above)
        return above if above <= below + self._rung(tokens - below) + self.step_tokens else below

    def _rung(self, tokens: int) -> int:
        """The fewest tokens of a step that takes so many, or the most."""
        return next((n for n in self.tokens if n >= tokens), self.tokens[-1])

    def rows_for(self, rows: int) -> int:
        """Rows of the decode step for so many sequences."""
        return next(n for n in self.rows if n >= rows)

    def width_for(self, tokens: int) -> int:
        """Pages that attention reaches in a step whose longest sequence has so many tokens after it."""
        return next(n for n in self.widths if n * PAGE >= tokens)
