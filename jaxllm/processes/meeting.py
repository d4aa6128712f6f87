"""How processes find each other: process 0 listens, the others come to it, each with two connections.

jax's own meeting ends in a stack trace, or never, where a process is missing or of another version: so it is held afterwards.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from jaxllm.processes.distributed import Distributed
from jaxllm.processes.wire import Wire
from sharding.mesh import DeviceError

WATCH, STEPS = "watch", "steps"  # the two connections: whether a process lives, and what it is to do
_GREETING = 10.0  # seconds in which who has connected says who it is
_AGAIN = 0.2  # seconds between two tries to connect


@dataclass(frozen=True)
class Member:
    """A process, as another one sees it."""

    index: int
    host: str
    pid: int
    wires: dict[str, Wire]

    def __str__(self) -> str:
        return f"process {self.index} ({self.host}, pid {self.pid})"

    def refuse(self, sentence: str) -> None:
        """Say why there will be no run."""
        for wire in self.wires.values():
            with suppress(OSError):
                wire.send({"refused": sentence})
        self.close()

    def close(self) -> None:
        for wire in self.wires.values():
            wire.close()


def hello(where: Distributed) -> dict[str, Any]:
    """What a process says of itself."""
    versions = {name: version(name) for name in ("jaxllm", "jax", "jaxlib")}
    return {"processes": where.processes, "versions": versions} | {
        "index": where.process_id,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def meet(where: Distributed) -> tuple[list[Member], str]:
    """The others, of whom a process that is not 0 knows that one alone; and the address of jax's service. Raises DeviceError."""
    return _gather(where) if where.process_id == 0 else _come(where)


# Process 0


def _gather(where: Distributed) -> tuple[list[Member], str]:
    host, port = where.address
    try:
        listener = _listening(host, port)
    except OSError as error:
        raise DeviceError(
            f"process 0 cannot listen on {where.coordinator} ({error.strerror or error}): give this host's name and a free port"
        ) from error
    members: dict[int, Member] = {}
    with listener:
        try:
            _accept_all(listener, where, members)
        except DeviceError as error:
            for member in members.values():
                member.refuse(str(error))
            raise
        service = f"{where.coordinator.rpartition(':')[0]}:{_free_port(host)}"
    for member in members.values():
        member.wires[WATCH].send({"service": service, **hello(where)})
    return [members[i] for i in sorted(members)], service


def _accept_all(listener: socket.socket, where: Distributed, members: dict[int, Member]) -> None:
    deadline = time.monotonic() + where.timeout
    while missing := [i for i in range(1, where.processes) if len(members[i].wires if i in members else ()) < 2]:
        listener.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            accepted, _ = listener.accept()
        except TimeoutError:
            which = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
            raise DeviceError(
                f"{which} of {where.processes} did not come to {where.coordinator} within {where.timeout:.0f} s: start every "
                "process with its own --process-id, or ask for fewer --processes"
            ) from None
        wire = Wire(accepted)
        try:
            message = wire.receive(_GREETING)
            index, kind = int(message["index"]), str(message["kind"])
        except (OSError, EOFError, KeyError, ValueError, TypeError):  # somebody else's connection
            wire.close()
            continue
        member = Member(index, str(message.get("host")), int(message.get("pid", 0)), {})
        member = members.setdefault(index, member)
        taken = kind in member.wires or member.pid != message.get("pid")
        try:
            _check(hello(where), message, member, taken)
        except DeviceError as error:
            Member(index, member.host, member.pid, {kind: wire}).refuse(str(error))
            raise
        member.wires[kind] = wire


def _check(ours: dict[str, Any], theirs: dict[str, Any], member: Member, taken: bool) -> None:
    """Raises DeviceError where another process cannot be one of these."""
    if theirs.get("processes") != ours["processes"]:
        raise DeviceError(
            f"{member} was started for {theirs.get('processes')} processes and process 0 for {ours['processes']}: give all "
            "of them the same --processes"
        )
    if taken or not 0 < member.index < ours["processes"]:
        raise DeviceError(f"{member} came twice: give every process its own --process-id")
    for name, own in ours["versions"].items():
        if (other := theirs["versions"].get(name)) != own:
            raise DeviceError(f"{member} has {name} {other} and process 0 has {own}: install the same on all hosts")


def _free_port(host: str) -> int:
    with _listening(host, 0) as probe:
        return int(probe.getsockname()[1])


def _listening(host: str, port: int) -> socket.socket:
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)


# The others


def _come(where: Distributed) -> tuple[list[Member], str]:
    deadline = time.monotonic() + where.timeout
    wires = {kind: _connect(where, deadline) for kind in (WATCH, STEPS)}
    first = Member(0, where.address[0], 0, wires)
    for kind, wire in wires.items():
        with suppress(OSError):  # refused before it is heard out: the answer says why
            wire.send({"kind": kind, **hello(where)})
    try:
        answer = wires[WATCH].receive(max(deadline - time.monotonic(), 0.01) + _GREETING)
    except (OSError, EOFError) as error:
        first.close()
        raise DeviceError(
            f"process 0 at {where.coordinator} has ended before all processes were there: its own message says why"
        ) from error
    if "refused" in answer:
        first.close()
        raise DeviceError(answer["refused"])
    return [replace(first, host=answer["host"], pid=answer["pid"])], str(answer["service"])


def _connect(where: Distributed, deadline: float) -> Wire:
    while True:
        try:
            return Wire(socket.create_connection(where.address, timeout=_GREETING))
        except OSError as error:
            if time.monotonic() > deadline:
                raise DeviceError(
                    f"nobody answers at {where.coordinator} ({error.strerror or error}) for {where.timeout:.0f} s: is process 0 "
                    "running there, and does a firewall let its port through?"
                ) from error
            time.sleep(_AGAIN)
