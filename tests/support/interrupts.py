"""Ctrl-C at random moments of `jaxllm generate`: `python tests/support/interrupts.py 200`.

Half of the runs begin with an empty compilation cache, half with one that has every program. The moments are spread evenly,
each drawn from its own part, from the process's start to where an undisturbed run ends.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from processes import environment_in
from terminals import UNIGNORED
from tiny_checkpoint import write_tiny, write_tokenizer

LIMIT = 30.0  # seconds until a process that does not end is killed


@dataclass(frozen=True)
class Interrupted:
    """The end of a run that was sent SIGINT `after` so many seconds, and took `seconds` more."""

    warm: bool
    after: float
    seconds: float
    code: int
    out: str
    err: str

    @property
    def finished(self) -> bool:
        """Whether it had given its answer before: there was nothing left to stop."""
        return self.code == 0 and self.out.startswith("abc") and self.err == ""

    @property
    def stopped(self) -> bool:
        return self.code == 130 and self.err == "stopped\n"

    def __str__(self) -> str:
        said = f", {self.err!r}" if not (self.stopped or self.finished) else ""
        return f"{'warm' if self.warm else 'cold'} {self.after:.3f} s: code {self.code} in {self.seconds:.2f} s{said}"


def model_in(folder: Path) -> Path:
    """One that takes a while to compile and to answer."""
    sizes = {"vocab_size": 258, "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257}
    return write_tokenizer(write_tiny(folder, **sizes))


def start(model: Path, xdg: Path) -> subprocess.Popen[str]:
    """`jaxllm generate` with its caches in `xdg`, as a process that has just begun."""
    xdg.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "jaxllm",
        "generate",
        str(model),
        "abc",
        "--virtual-devices",
        "2",
        "--max-tokens",
        "400",
    ]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", UNIGNORED, *command], env=environment_in(xdg), stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    while Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[1:2] != [b"-m"]:
        time.sleep(0.0005)
    return process


def undisturbed(model: Path, xdg: Path) -> float:
    """Seconds of a whole run."""
    began, process = time.perf_counter(), start(model, xdg)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return time.perf_counter() - began


def interrupt(model: Path, xdg: Path, after: float, warm: bool) -> Interrupted:
    process = start(model, xdg)
    began = time.perf_counter()
    while process.poll() is None and time.perf_counter() - began < after:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    sent = time.perf_counter()
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return Interrupted(warm, after, time.perf_counter() - sent, process.returncode, out, err)


def interrupt_often(folder: Path, moments: int, seed: int, since: float) -> list[Interrupted]:
    """At so many moments from `since` on. The caches that are left serve one more run, which must say nothing."""
    draw, model, found = random.Random(seed), model_in(folder / "model"), []
    full = folder / "full"
    lengths = {False: undisturbed(model, full), True: undisturbed(model, full)}
    for i in draw.sample(range(moments), moments):
        warm, xdg = bool(i % 2), folder / "xdg"
        shutil.rmtree(xdg, ignore_errors=True)
        if warm:
            shutil.copytree(full, xdg)
        part = (i // 2 + draw.random()) / (moments / 2)
        found.append(interrupt(model, xdg, since + part * (lengths[warm] - since), warm))
        print(found[-1], flush=True)
        if i % 10 == 0:
            undisturbed(model, xdg)
    return found


def main() -> None:
    moments, since = int(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    with tempfile.TemporaryDirectory() as folder:
        found = interrupt_often(Path(folder), moments, 0, since)
    ended = [one for one in found if not one.finished]
    stopped = sum(one.stopped for one in ended)
    print(
        f"{moments} moments: {moments - len(ended)} after the answer; of the other {len(ended)}, {stopped} ended with code 130 "
        f"and one line; the longest took {max(one.seconds for one in ended):.2f} s"
    )


if __name__ == "__main__":
    main()
