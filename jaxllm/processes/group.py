"""Processes that have met: what process 0 tells the others, and the watch over each.

Process 0 decides, the others do what it does. Where one ends or falls silent the others would wait within a step for ever, and
some backends of jax do: so each of them says which it was, and ends too.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from jaxllm.processes.distributed import Distributed
from jaxllm.processes.meeting import STEPS, WATCH, Member, meet
from sharding.mesh import DeviceError

BEAT = 1.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without one, after which a process is taken for dead
SHUTDOWN = 30  # seconds in which all must end where one has


class Group:
    """The processes of a run, as one of them sees it.

    Attributes:
      on_loss: called with a sentence before the process ends for the loss of another; it may take a few seconds.
    """

    def __init__(self, where: Distributed):
        """Meets the others, and joins jax's service with them. Raises DeviceError."""
        self.index, self.count = where.process_id, where.processes
        self.members, service = meet(where)
        self.on_loss: Callable[[str], None] = lambda sentence: None
        self._ended, self._failed, self._losing = False, False, threading.Lock()
        self._stderr = os.dup(2)  # which is turned elsewhere while jax looks for devices
        for member in self.members:
            threading.Thread(target=self._watch, args=(member,), name="jaxllm-watch", daemon=True).start()
        threading.Thread(target=self._beat, name="jaxllm-beat", daemon=True).start()
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from a server
        jax.distributed.initialize(
            service,
            where.processes,
            where.process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=int(where.timeout),
            heartbeat_timeout_seconds=10 * SHUTDOWN,  # ours is sooner, and says who
            shutdown_timeout_seconds=SHUTDOWN,
        )
        atexit.register(self.end)

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    @property
    def on_this_host(self) -> int:
        """How many processes are on the host that has most of them, as far as this one knows: process 0 knows all."""
        hosts = [socket.gethostname(), *(member.host for member in self.members)]
        return max(map(hosts.count, hosts))

    # What process 0 tells

    @contextmanager
    def telling(self, *message: Any) -> Iterator[None]:
        """The others do what is done within. Where that fails, all end: they would wait for it for ever."""
        for member in self.members:
            with suppress(OSError):  # the watch tells
                member.wires[STEPS].send({"do": list(message)})
        try:
            yield
        except Exception as error:
            self.lose(f"process {self.index} failed ({error}): all processes end, start them again")
            raise

    def told(self) -> Iterator[list[Any]]:
        """What process 0 does, up to its end."""
        while True:
            try:
                message = self.members[0].wires[STEPS].receive()
            except (OSError, EOFError):
                if self._ended:
                    return
                time.sleep(SILENCE)  # the watch ends this process meanwhile
                return
            if "end" in message:
                self._ended = True
                return
            yield message["do"]

    def share(self, value: Any) -> Any:
        """Process 0's value, on all of them."""
        if self.leads:
            for member in self.members:
                member.wires[STEPS].send({"value": value})
            return value
        return self._from(self.members[0], "value")

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order, on process 0; on the others an empty list."""
        if self.leads:
            return [value, *(self._from(member, "value") for member in self.members)]
        self.members[0].wires[STEPS].send({"value": value})
        return []

    def agree(self, run: dict[str, Any]) -> None:
        """Raises DeviceError on all processes where one of them is set up otherwise than process 0."""
        sentence = ""
        for i, theirs in enumerate(self.gather(run)):
            if differing := [key for key in run if theirs.get(key) != run[key]]:
                key = differing[0]
                sentence = (
                    f"process {i} has another {key} than process 0 ({theirs.get(key)}, not {run[key]}): start all of them alike"
                )
                break
        if sentence := self.share(sentence):
            self._ended = True  # each raises on its own
            raise DeviceError(sentence)

    def _from(self, member: Member, key: str) -> Any:
        try:
            return member.wires[STEPS].receive()[key]
        except (OSError, EOFError, KeyError) as error:
            time.sleep(SILENCE if not self._ended else 0)  # the watch ends this process meanwhile
            raise DeviceError(f"{member} has ended") from error

    # The end

    def end(self) -> None:
        """Process 0 ends the run of all processes in order. For this process's exit."""
        if self._failed:  # jax would wait for the others, or abort for their absence
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        if self._ended or not self.leads:
            return
        self._ended = True
        for member in self.members:
            for wire in member.wires.values():
                with suppress(OSError):
                    wire.send({"end": True})

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Tell the others of an error within, for which this process ends."""
        try:
            yield
        except BaseException as error:
            if not self._ended:
                self._ended = self._failed = True
                self._tell({"lost": f"process {self.index} failed ({error}): all processes end, start them again"})
            raise

    def lose(self, sentence: str) -> None:
        """End this process and the others, with a sentence."""
        with self._losing:
            if self._ended:
                return
            self._ended = True
            os.write(self._stderr, f"jaxllm: {sentence}\n".encode())  # at once: jax may abort the process for the same reason
            self._tell({"lost": sentence})
            self.on_loss(sentence)
            sys.stdout.flush()
            os._exit(1)

    def _tell(self, message: dict[str, Any]) -> None:
        for member in self.members:
            with suppress(OSError):
                member.wires[WATCH].send(message)

    def _watch(self, member: Member) -> None:
        while not self._ended:
            try:
                message = member.wires[WATCH].receive(SILENCE)
            except TimeoutError:
                self.lose(f"{member} has not been heard of for {SILENCE:.0f} s: all processes end, start them again")
                return
            except (OSError, EOFError):
                self.lose(f"{member} has ended: all processes end, start them again")
                return
            if "end" in message:
                self._ended = True
            elif "lost" in message:
                self.lose(message["lost"])

    def _beat(self) -> None:
        while not self._ended:
            self._tell({"beat": True})
            time.sleep(BEAT)


_joined: list[Group] = []


def join(where: Distributed) -> Group:
    """The group of this process, which can be one of a single one. Raises DeviceError."""
    if _joined:
        raise DeviceError("this process is one of several already: make one LLM, with `distributed`, in each")
    _joined.append(Group(where))
    return _joined[0]
