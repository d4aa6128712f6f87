"""Scoring over a crew: the rows of one process's packing, dealt out in whole steps.

So what is shared is exactly what one process shares, and each score has the bits that one process gives it. Where there are fewer
steps than workers, rows are made shorter: other bits, and a little more of what is shared computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain

from jaxllm.integrations.ray.crew import Crew, Failed
from jaxllm.requests.encoding import Pair
from jaxllm.scoring.partition import EACH
from jaxllm.scoring.scorer import Cut, Packing, Score, pack_pairs

SHORTEST = 1024  # tokens of a row that is made shorter: with fewer, steps would wait for the weights to be read


def pack_for(workers: int, pairs: Sequence[Pair], names: Sequence[str], cut: Cut, exact: bool = False) -> Packing:
    """As one process packs them if that gives each worker a step, or it has to be `exact`; else in rows for EACH steps each."""
    packing = pack_pairs(pairs, names, cut)
    steps = len(packing.steps(cut.data))
    if exact or not 0 < steps < workers or packing.length <= SHORTEST:
        return packing
    shorter = packing.length >> math.ceil(math.log2(EACH * workers / steps))
    return pack_pairs(pairs, names, cut._replace(max_step_tokens=max(shorter, SHORTEST)))


def task_steps(steps: int, workers: int) -> int:
    """Steps of a task, where so many are left."""
    return max(1, round(steps / (EACH * workers)))


def score_parts(crew: Crew, packing: Packing) -> Iterator[list[tuple[int, Score | str]]]:
    """Wanted pairs, each with its score or why it has none, as parts of the packing end. It is packed as the crew's cut says."""
    steps = packing.steps(crew.facts.cut.data)
    each = task_steps(len(steps), crew.size)
    parts = [packing.part([*chain(*steps[at : at + each])]) for at in range(0, len(steps), each)]
    for task, result in crew.run([part for _, part in parts]):
        pairs, part = parts[task]
        found = [(pair, result.reason) for pair in sorted(part.wanted)] if isinstance(result, Failed) else result
        yield [(pairs[pair], score) for pair, score in found]


def tokens_left(packing: Packing, data: int) -> int:
    """Tokens after sharing of the steps that score what is wanted."""
    return sum(one.row.size for rows in packing.steps(data) for one in rows)
