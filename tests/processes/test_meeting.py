"""Processes find each other, or say in a sentence why not; what they tell each other comes out as it went in."""

from __future__ import annotations

import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.execution.batch import empty_decode_batch, empty_packed_batch, empty_sampling_batch
from jaxllm.processes import meeting
from jaxllm.processes.distributed import Distributed, first_of, of_launcher
from jaxllm.processes.meeting import STEPS, WATCH, Member, meet
from jaxllm.processes.messages import decoded, encoded
from jaxllm.processes.wire import Wire
from sharding.layout import make_layout
from sharding.mesh import DeviceError

pytestmark = pytest.mark.fast


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def meet_all(*of: tuple[int, int], timeout: float = 5.0) -> list[Any]:
    """(processes, process id) of each -> whom it met, or its sentence."""
    where = f"127.0.0.1:{free_port()}"

    def one(processes: int, index: int) -> Any:
        try:
            members, service = meet(Distributed(where, processes, index, timeout))
            met.extend(members)
            wires = [kind for member in members for kind in member.wires]
            return sorted(member.index for member in members), service, list(map(str, members)), wires
        except DeviceError as error:
            return str(error)

    met: list[Member] = []
    with ThreadPoolExecutor(len(of)) as pool:
        found = list(pool.map(lambda given: one(*given), of))
    for member in met:
        member.close()
    return found


def test_all_meet_the_first() -> None:
    first, *others = meet_all((3, 0), (3, 2), (3, 1))
    assert first[0] == [1, 2] and [other[0] for other in others] == [[0], [0]]
    assert first[1] == others[0][1] == others[1][1]
    assert {*first[3]} == {WATCH, STEPS} and first[2][0].startswith("process 1 (")


def test_alone_meets_nobody() -> None:
    [(members, service, *_)] = meet_all((1, 0))
    assert members == [] and service.startswith("127.0.0.1:")


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    [first] = meet_all((3, 0), timeout=0.2)
    assert "processes 1, 2 of 3 did not come to 127.0.0.1:" in first and "start every process with its own" in first
    first, second = meet_all((3, 0), (3, 2), timeout=0.5)
    assert first.startswith("process 1 of 3 did not come to") and second == first
    monkeypatch.setattr(meeting, "_AGAIN", 0.05)
    [other] = meet_all((2, 1), timeout=0.2)
    assert "nobody answers at 127.0.0.1:" in other and "is process 0 running there" in other


def test_who_is_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = meet_all((2, 0), (3, 1))
    assert "was started for 3 processes and process 0 for 2: give all of them the same --processes" in first
    assert second == first
    first, *_ = meet_all((3, 0), (3, 1), (3, 1))
    assert "came twice: give every process its own --process-id" in first
    hello = meeting.hello

    def of_versions(where: Distributed) -> dict[str, Any]:
        return hello(where) | {"versions": {"jaxllm": "1", "jax": f"0.{where.process_id}", "jaxlib": "2"}}

    monkeypatch.setattr(meeting, "hello", of_versions)
    first, second = meet_all((2, 0), (2, 1))
    assert "has jax 0.1 and process 0 has 0.0: install the same on all hosts" in first
    assert second == first


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DeviceError, match=rf"process 0 cannot listen on 127\.0\.0\.1:{port} \(Address already in use"):
            meet(Distributed(f"127.0.0.1:{port}", 2, 0, 1.0))


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", struct.pack("!Q", 3) + b"\xc1\xc1\xc1", b""])
def test_a_stranger_does_no_harm(said: bytes) -> None:
    where = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(meet, Distributed(where, 2, 0, 10.0))
        time.sleep(0.1)
        with closing(socket.create_connection(("127.0.0.1", int(where.split(":")[1])))) as stranger:
            stranger.sendall(said)
        second = pool.submit(meet, Distributed(where, 2, 1, 10.0))
        met = [*first.result()[0], *second.result()[0]]
        assert [member.index for member in met] == [1, 0]
        for member in met:
            member.close()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("host", 2, 0), "coordinator 'host': give HOST:PORT"),
        (("host:99999", 2, 0), "coordinator 'host:99999': give HOST:PORT"),
        (("a b:1", 2, 0), "coordinator 'a b:1': give HOST:PORT"),
        (("host:1", 0, 0), "0 processes: give how many there are"),
        (("host:1", 2, 2), "process id 2 of 2 processes: give 0 to 1"),
        (("host:1", 2, -1), "process id -1 of 2 processes: give 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, int, int], said: str) -> None:
    with pytest.raises(DeviceError) as caught:
        Distributed(*arguments)
    assert said in str(caught.value)


def test_launchers_say_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE", "RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert Distributed.given(None, None, None) is None
    with pytest.raises(DeviceError, match="belong together"):
        Distributed.given("a:1", 2, None)
    with pytest.raises(DeviceError, match="no launcher says where process 0 is"):
        Distributed.given("auto", 2, 0)
    assert of_launcher({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}) == (4, 3)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[03-04]")
    assert Distributed.given("auto", None, None) == Distributed("gpu03:8476", 2, 1)
    assert Distributed.given("[::1]:7", None, 0) == Distributed("[::1]:7", 2, 0)
    monkeypatch.setenv("MASTER_ADDR", "here")
    assert Distributed.given("auto", None, None) == Distributed("here:8476", 2, 1)


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("n[1-3]", "n1"), ("n[03,7-9]-ib,m1", "n03-ib"), ("n1,n[2-3]", "n1")]
)
def test_the_first_of_slurms_hosts(nodes: str, first: str) -> None:
    assert first_of(nodes) == first


def test_messages_come_out_as_they_went_in() -> None:
    layout = make_layout("tensor", jax.devices()[:1], 24)
    sampling = empty_sampling_batch(2, 1, filters=True, listed=64, biases=2, bad_words=(1, 2))
    batches = (
        empty_decode_batch(2, 1, 1, sampling),
        empty_packed_batch(layout, 128, 128),
        (7, None, "x", np.int32(3), 2.5, True),
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here, there = socket.create_connection(listener.getsockname()), listener.accept()[0]
    with closing(Wire(here)) as near, closing(Wire(there)) as far:
        near.send({"do": [encoded(batches)]})
        found = decoded(far.receive(1)["do"][0])
    assert str(jax.tree.structure(found)) == str(jax.tree.structure(batches))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(batches), strict=True):
        assert np.asarray(one).dtype == np.asarray(other).dtype or not isinstance(other, np.ndarray)
        np.testing.assert_array_equal(one, other)
    with pytest.raises(TypeError, match="a set is no message"):
        encoded(({1},))
    with pytest.raises(KeyError):
        decoded({"kind": "os.system", "of": ["true"]})
