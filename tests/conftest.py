"""The environment of every test: eight virtual CPU devices, and jax strict about shapes."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

# jax reads its environment when it is imported. The laws are held on CPU devices, whatever else the machine has; set
# JAX_PLATFORMS yourself to run them elsewhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The CUDA plugin is installed to compile for GPUs that are not there. Without this it looks for the CUDA libraries when
# it is loaded, finds none, and prints an error.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

# Most of a test is compiling. LLVM need not optimise what runs a few times: the programs are the same, their machine code is
# slower and made in two thirds of the time. Tests marked `optimised` have it as users do; `XLA_FLAGS= pytest` runs all so.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# What an earlier run has compiled, by this version or another, has no part in this one's result; its workers share theirs.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxllm-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# An array that broadcasts to a higher rank is written with its axes: `scale[None, None, :]`, not `scale`. Strict dtype
# promotion cannot be asked for in the same way: jax.nn.dot_product_attention and optax rely on implicit promotion.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def optimised(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is marked `optimised` compiles its steps as users do."""
    if jax.default_backend() == "cpu" and request.node.get_closest_marker("optimised"):
        from jaxllm.execution import steps

        options = steps.compiler_options
        monkeypatch.setattr(steps, "compiler_options", lambda layout: options(layout) | {"xla_backend_optimization_level": 3})


@pytest.fixture(scope="module")
def client(http: Any) -> Iterator[Any]:
    """OpenAI's own client of the server that a module's tests ask, their `http`."""
    from openai import OpenAI

    with OpenAI(base_url=f"{http.base_url}/v1", api_key="any", max_retries=0) as client:
        yield client


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On other devices than a CPU's, which are as many as one likes, tests of more than there are skip themselves."""
    if os.environ["JAX_PLATFORMS"] == "cpu":
        return
    here = len(jax.devices())
    for item in items:
        wanted = item.callspec.params.get("devices") if hasattr(item, "callspec") else None
        if isinstance(wanted, int) and wanted > here:
            item.add_marker(pytest.mark.skip(reason=f"of {wanted} devices: {here} here"))
