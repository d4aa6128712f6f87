"""Many nodes on Ray: a model on each, rows of a data set divided so that what they share is computed once. `jaxllm[ray]`.

`generate_dataset` and `score_dataset` keep results as they come, go on after an interruption and survive what dies. `Generate`
and `Score` are for `ray.data.Dataset.map_batches`, which deals rows out as they lie.
"""

from __future__ import annotations

try:
    import ray  # noqa: F401
except ImportError as error:
    raise ImportError("many nodes need Ray: pip install 'jaxllm[ray]'", name="ray") from error

from jaxllm.integrations.ray.batches import Generate, Score
from jaxllm.integrations.ray.cluster import Place, cluster
from jaxllm.integrations.ray.datasets import Summary, generate_dataset, score_dataset

__all__ = ["Generate", "Place", "Score", "Summary", "cluster", "generate_dataset", "score_dataset"]
