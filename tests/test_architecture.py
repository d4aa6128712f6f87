"""Imports go one way, from room to room, and never in a circle.

sharding <- decoder <- execution <- generation | scoring | planning | processes <- llm <- evaluation, serving
<- integrations <- commands, bench.
At the bottom, without jax: what users give and get (`requests`), the model as data (`config`), the ladder of shapes (`buckets`),
what platforms want done otherwise (`platforms`). Of `jaxllm`, `checkpoints` needs the config and the decoder alone. Read from the
source, so an import inside a function counts as one at the top. A rule that names a package holds for all of it; where two rules
fit a module, the longer name decides.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT

pytestmark = pytest.mark.fast

PACKAGES = ("bench", "checkpoints", "jaxllm", "sharding")
TOP_FILES = 9  # at most, in `jaxllm` itself: a newcomer looks there first

GROUND = ("jaxllm.buckets", "jaxllm.config", "jaxllm.platforms", "jaxllm.requests")
DEVICE = (*GROUND, "jaxllm.decoder", "jaxllm.execution", "sharding")
DOOR = (
    *DEVICE,
    "checkpoints",
    "jaxllm",
    "jaxllm.generation",
    "jaxllm.llm",
    "jaxllm.planning",
    "jaxllm.processes",
    "jaxllm.scoring",
)
# What a module may import of this repository; `jaxllm` by itself, in a right-hand side, is the package's own file.
MAY_IMPORT = {
    "sharding": ("sharding",),
    "checkpoints": ("checkpoints", "jaxllm.config", "jaxllm.decoder", "sharding"),
    "jaxllm": ("jaxllm.llm", "jaxllm.processes", "jaxllm.requests", "sharding"),
    "jaxllm.__main__": ("jaxllm.commands",),
    "jaxllm.buckets": ("sharding",),
    "jaxllm.config": ("sharding",),
    "jaxllm.platforms": (),
    "jaxllm.requests": ("jaxllm.buckets", "jaxllm.requests"),
    "jaxllm.decoder": ("jaxllm.buckets", "jaxllm.config", "jaxllm.decoder", "jaxllm.platforms", "sharding"),
    "jaxllm.execution": ("jaxllm.buckets", "jaxllm.config", "jaxllm.decoder", "jaxllm.execution", "jaxllm.platforms", "sharding"),
    "jaxllm.generation": (*DEVICE, "jaxllm.generation"),
    "jaxllm.planning": (*DEVICE, "jaxllm.planning"),
    "jaxllm.processes": (*DEVICE, "jaxllm.processes"),
    "jaxllm.scoring": (*DEVICE, "jaxllm.scoring"),
    "jaxllm.llm": DOOR,
    "jaxllm.commands": (*DOOR, "jaxllm.commands", "jaxllm.evaluation", "jaxllm.integrations", "jaxllm.serving"),
    "jaxllm.evaluation": (*GROUND, "jaxllm", "jaxllm.evaluation", "jaxllm.llm", "jaxllm.scoring"),
    "jaxllm.integrations": (*DOOR, "jaxllm.evaluation", "jaxllm.integrations"),
    "jaxllm.integrations.ray": (*DOOR, "jaxllm.integrations.ray", "jaxllm.serving"),
    "jaxllm.serving": (
        *GROUND,
        "jaxllm",
        "jaxllm.execution",
        "jaxllm.generation",
        "jaxllm.llm",
        "jaxllm.scoring",
        "jaxllm.serving",
    ),
    "bench": PACKAGES,
}
# What only some modules may import.
ONLY_IN = {
    "accelerate": ("bench.peers",),
    "fastapi": ("jaxllm.serving",),
    "gguf": ("checkpoints",),
    "jaxllm.generation.engine": ("bench", "jaxllm.generation.engine", "jaxllm.generation.loop", "jaxllm.llm"),
    "llguidance": ("jaxllm.generation.grammar",),
    "lm_eval": ("bench", "jaxllm.integrations"),
    "orbax": ("checkpoints",),
    "prometheus_client": ("jaxllm.serving",),
    "pyarrow": ("jaxllm.integrations.ray",),
    "ray": ("jaxllm.integrations.ray",),
    "torch": ("bench.peers", "checkpoints.torch_files"),
    "uvicorn": ("jaxllm.serving",),
    "vllm": ("bench.vllm_peer",),
}
# All that sharding/ needs besides the standard library.
SHARDING_MAY_IMPORT = ("jax", "numpy", "sharding")
# Host side: neither these nor what they import know of jax.
WITHOUT_JAX = (
    "jaxllm.buckets",
    "jaxllm.commands.interrupt",
    "jaxllm.commands.prompt_sources",
    "jaxllm.commands.terminal",
    "jaxllm.config",
    "jaxllm.decoder.mechanisms",
    "jaxllm.generation.grammar",
    "jaxllm.generation.scheduler",
    "jaxllm.planning.presets",
    "jaxllm.platforms",
    "jaxllm.requests",
    "jaxllm.scoring.partition",
    "jaxllm.scoring.trie",
    "sharding.absent_gpu",
    "sharding.padding",
)
DEVICE_LIBRARIES = ("flax", "jax", "jaxlib", "optax", "orbax")


class Imports(NamedTuple):
    """Dotted names that a module imports: anywhere in it, and while it is itself being imported."""

    all: frozenset[str]
    at_import: frozenset[str]


def within(name: str, prefixes: Iterable[str]) -> bool:
    """Is the dotted `name` one of `prefixes`, or inside one?"""
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def module_name(path: Path) -> str:
    """`jaxllm/llm.py` -> `jaxllm.llm`; a package's `__init__.py` has the package's name."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(node: ast.Import | ast.ImportFrom, package: str, modules: Iterable[str]) -> Iterator[str]:
    """Names a statement in `package` imports; `from a import b` is `a.b` where that is one of `modules`, else `a`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    for alias in node.names:
        yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base


def runs_later(node: ast.AST) -> bool:
    """A function's body, and what only a type checker reads."""
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
        isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    )


def imports_of(source: str, package: str, modules: Iterable[str] = ()) -> Imports:
    """The imports of `source`, a module in `package`."""
    everything: set[str] = set()
    at_import: set[str] = set()

    def visit(node: ast.AST, later: bool) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = set(imported_names(node, package, modules))
            everything.update(names)
            at_import.update(() if later else names)
        for child in ast.iter_child_nodes(node):
            visit(child, later or runs_later(node))

    visit(ast.parse(source), False)
    return Imports(frozenset(everything), frozenset(at_import))


@cache
def imports() -> dict[str, Imports]:
    """Every module of the packages -> its imports."""
    paths = {module_name(p.relative_to(ROOT)): p for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    return {
        name: imports_of(path.read_text(), name if path.stem == "__init__" else name.rpartition(".")[0], paths)
        for name, path in paths.items()
    }


def wrong_imports(module: str, names: Iterable[str]) -> list[str]:
    """The names that no rule lets `module` import."""
    allowed = MAY_IMPORT[max((rule for rule in MAY_IMPORT if within(module, [rule])), key=len)]
    wholes = allowed if allowed is PACKAGES else [name for name in allowed if name != "jaxllm"]
    wrong = {name for name in names if within(name, PACKAGES) and name not in allowed and not within(name, wholes)}
    for confined, homes in ONLY_IN.items():
        wrong |= {name for name in names if within(name, [confined]) and not within(module, homes)}
    return sorted(wrong)


def import_closure(module: str) -> set[str]:
    """The imports of `module`, those of the repository's modules among them, and so on."""
    reached: set[str] = set()
    pending = [module]
    while pending:
        names = imports()[pending.pop()].all - reached
        reached |= names
        pending += names & imports().keys()
    return reached


def loaded_first(module: str, names: Iterable[str]) -> set[str]:
    """The repository's modules that run before `module` has: those it imports, and the packages around them."""
    needed: set[str] = set()
    for name in names:
        parts = name.split(".")
        needed |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return {name for name in needed & imports().keys() if not within(module, [name])}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_read(package: str) -> None:
    assert (ROOT / package / "__init__.py").exists(), f"{package}/__init__.py is missing"
    assert sum(within(module, [package]) for module in imports()) == len([*(ROOT / package).rglob("*.py")])


def test_modules_import_what_the_rules_let_them() -> None:
    wrong = {module: wrong_imports(module, names.all) for module, names in imports().items()}
    assert {module: names for module, names in wrong.items() if names} == {}


def test_sharding_imports_jax_alone() -> None:
    standard = sys.stdlib_module_names
    names = {name for module, found in imports().items() if within(module, ["sharding"]) for name in found.all}
    assert [n for n in sorted(names) if not within(n, SHARDING_MAY_IMPORT) and n.split(".")[0] not in standard] == []


@pytest.mark.parametrize("room", WITHOUT_JAX)
def test_host_modules_do_without_jax(room: str) -> None:
    modules = [module for module in imports() if within(module, [room])]
    assert modules, f"there is no {room}"
    assert [(m, n) for m in modules for n in sorted(import_closure(m)) if within(n, DEVICE_LIBRARIES)] == []


def test_few_files_stand_at_the_top() -> None:
    assert len([*(ROOT / "jaxllm").glob("*.py")]) <= TOP_FILES


def test_rooms_stand_on_floors() -> None:
    """No circle of rooms either: what holds of modules need not hold of them."""
    graph: dict[str, set[str]] = {}
    for module, names in imports().items():
        reached = {_room(name) for name in names.all if name in imports()}
        graph.setdefault(_room(module), set()).update(reached - {_room(module), "jaxllm"})
    TopologicalSorter(graph).prepare()  # a CycleError names the rooms


def _room(module: str) -> str:
    """`jaxllm.decoder.rope` -> `jaxllm.decoder`; what other packages hold is one room."""
    first, *rest = module.split(".")
    return ".".join([first, *rest[:1]]) if first == "jaxllm" else first


def test_no_module_needs_itself_to_be_imported() -> None:
    """Why `jaxllm/__init__.py` imports `jaxllm.llm` on demand: `checkpoints` runs it on the way to `jaxllm.config`."""
    graph = {module: loaded_first(module, names.at_import) for module, names in imports().items()}
    TopologicalSorter(graph).prepare()  # a CycleError names the modules


def test_imports_are_found_in_every_form() -> None:
    source = """
import jax.numpy as jnp, torch
from typing import TYPE_CHECKING
from jaxllm import LLM, config
from . import llama
from .. import load
from ..names import rule
if TYPE_CHECKING:
    from jaxllm.decoder.model import Decoder
def late():
    from .gemma import read
"""
    modules = {"jaxllm.config", "checkpoints.families.llama", "checkpoints.load"}
    found = imports_of(source, "checkpoints.families", modules)
    first = {"jax.numpy", "torch", "typing", "jaxllm", "jaxllm.config"}
    first |= {"checkpoints.families.llama", "checkpoints.load", "checkpoints.names"}
    assert found.at_import == first
    assert found.all == first | {"jaxllm.decoder.model", "checkpoints.families.gemma"}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("sharding.mesh", "jaxllm.config"),
        ("sharding.mesh", "checkpoints"),
        ("jaxllm.decoder.model", "checkpoints.names"),
        ("jaxllm.generation.engine", "checkpoints.load"),
        ("jaxllm.decoder.model", "jaxllm.generation.engine"),
        ("jaxllm.decoder.model", "jaxllm.execution.steps"),
        ("jaxllm.execution.programs", "jaxllm.scoring.scorer"),
        ("jaxllm.generation.request", "jaxllm.scoring.trie"),
        ("jaxllm.planning.plan", "jaxllm.scoring.scorer"),
        ("jaxllm.requests.prompts", "jaxllm"),
        ("jaxllm.evaluation.multiple_choice", "checkpoints.hub"),
        ("checkpoints.load", "jaxllm.configs"),
        ("jaxllm.llm", "bench.latency"),
        ("checkpoints.load", "jaxllm"),
        ("checkpoints.load", "jaxllm.generation.engine"),
        ("checkpoints.load", "torch"),
        ("bench.hellaswag", "torch.nn"),
    ],
)
def test_a_wrong_import_is_seen(module: str, name: str) -> None:
    assert wrong_imports(module, [name, "jax"]) == [name]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("checkpoints.load", "jaxllm.config"),
        ("jaxllm.llm", "checkpoints.load"),
        ("jaxllm.llm", "jaxllm.generation.engine"),
        ("bench.peers.transformers", "torch"),
        ("jaxllm.scoring.scorer", "jaxllm.execution.steps"),
        ("jaxllm.evaluation.multiple_choice", "jaxllm"),
    ],
)
def test_a_right_import_is_let_pass(module: str, name: str) -> None:
    assert wrong_imports(module, [name]) == []
