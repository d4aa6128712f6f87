"""The parts in their order: what is cheap and decides most comes first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

# XLA takes three quarters of a GPU's memory unless told otherwise: LLaMA-30B on one H100 needs more.
WHOLE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}


@dataclass(frozen=True)
class Part:
    """A measurement.

    Attributes:
      seconds: its time limit.
      arguments: of its module; `rehearsal` in their place with tiny models.
    """

    name: str
    seconds: float
    module: str
    arguments: tuple[str, ...] = ()
    rehearsal: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=lambda: WHOLE)

    def command(self, results: Path, *, rehearse: bool) -> list[str]:
        """Arguments of Python."""
        more = self.rehearsal if rehearse else self.arguments
        return ["-m", f"bench.gpu.{self.module}", "--results", str(results), "--part", self.name, *more]


TINY = ("--config", "smollm2-135m", "--layers", "2", "--dtype", "float32")
PARTS = (
    Part("ceilings", 60, "ceilings", rehearsal=("--few",)),
    Part("kernels", 90, "kernels", rehearsal=("--small", "--tokens", "256")),
    Part(
        "llama-7b", 150, "model",
        ("--config", "llama-7b", "--rows", "1", "8", "64", "--tokens", "129", "--prompts", "512", "2000",
         "--questions", "300", "--profile"),
        (*TINY, "--rows", "1", "2", "--tokens", "5", "--prompts", "64", "--questions", "4", "--profile"),
    ),
    Part("exactness", 150, "exactness", rehearsal=("--processes", "1", "-k", "test_greedy_takes"), environment={
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the GPU
    }),
    Part(
        "llama-30b", 210, "model",
        ("--config", "llama-30b", "--rows", "1", "64", "--tokens", "32", "--prompts", "2000",
         "--questions", "1000", "--profile"),
        (*TINY, "--rows", "1", "--tokens", "3", "--prompts", "64", "--questions", "4"),
    ),
    Part("options", 120, "options", ("--config", "llama-7b", "--rows", "1", "64"), (*TINY, "--rows", "1", "--only", "ours")),
    Part("shard", 90, "shard", ("--config", "llama-30b", "--shards", "4", "--rows", "1", "8", "64"),
         (*TINY, "--shards", "1", "--rows", "1")),
)  # fmt: skip
