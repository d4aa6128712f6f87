"""Ctrl-C: the end within moments, one line, code 130, whatever the process is doing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interrupts import interrupt_often
from paths import ROOT
from terminals import UNIGNORED

BEGIN = """
import signal, sys, time
from jaxllm.commands.interrupt import Interrupts
interrupts = Interrupts()
interrupts.install()

def ready():
    print("ready", flush=True)
"""
# In C code that gives up Python's lock and that no signal ends, as in a compilation.
COMPILING = """
import ctypes
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
lock(mutex)
ready()
lock(mutex)
"""
SWALLOWED = """
import gc, jaxllm.commands.interrupt
jaxllm.commands.interrupt.GRACE = 20  # on a busy machine one second passes before it has unwound
def callback(phase, info):
    if phase == "start":
        ready()
        time.sleep(0.5)
gc.callbacks.append(callback)
try:
    gc.collect()
    gc.callbacks.clear()
    time.sleep(60)
except KeyboardInterrupt:
    print("unwound", flush=True)
    interrupts.end()
"""
# Sent to another thread, which does not wake this one; so does one that comes just before it falls asleep.
UNHEARD = """
import threading, jaxllm.commands.interrupt
jaxllm.commands.interrupt.GRACE = 20
threading.Timer(0.1, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT)).start()
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("unwound", flush=True)
    interrupts.end()
"""
# As numpy's `import_array` does for an extension that is imported.
PRINTED = """
try:
    try:
        ready()
        time.sleep(60)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        raise ImportError("numpy._core.multiarray failed to import")
except ImportError:
    interrupts.end()
"""
# As jax does around the plugins that it looks for.
LOGGED = """
import logging
try:
    ready()
    time.sleep(60)
except:
    logging.getLogger("jax").exception("Jax plugin configuration error")
interrupts.finish()
"""
AT_THE_END = """
try:
    ready()
    time.sleep(60)
except KeyboardInterrupt:
    interrupts.end()
"""
WAITED_FOR = """
from concurrent.futures import ThreadPoolExecutor
try:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(time.sleep, 60)
        ready()
        time.sleep(60)
except KeyboardInterrupt:
    interrupts.end()
"""
EXTENSION = """
import time
try:
    print("ready", flush=True)
    time.sleep(60)
except BaseException:
    print("raised", flush=True)
"""
DEFERRED = """
try:
    with interrupts.deferred() as pressed:
        ready()
        while not pressed():
            time.sleep(0.01)
    time.sleep(1.5)
    ready()
    time.sleep(60)
except KeyboardInterrupt:
    interrupts.end()
"""
FINISHED = "ready(); interrupts.finish(); ready(); time.sleep(1)"


def run(program: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", UNIGNORED, sys.executable, "-c", BEGIN + program]
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def press(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("program", "out"),
    [(COMPILING, ""), (SWALLOWED, "unwound\n"), (PRINTED, ""), (LOGGED, ""), (AT_THE_END, ""), (WAITED_FOR, "")],
    ids=["compiling", "swallowed", "printed", "logged", "at the end", "waited for"],
)
def test_it_ends_with_one_line(program: str, out: str) -> None:
    process = run(program)
    press(process)
    began = time.monotonic()
    assert process.communicate(timeout=30) == (out, "stopped\n")
    assert process.returncode == 130
    assert time.monotonic() - began < 5  # about one; the machine is busy


def test_a_sleeping_main_thread_is_woken() -> None:
    began = time.monotonic()
    assert run(UNHEARD).communicate(timeout=30) == ("unwound\n", "stopped\n")
    assert time.monotonic() - began < 10  # GRACE is 20 there


def test_a_second_press_waits_for_nothing() -> None:
    process = run(COMPILING)
    press(process)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "stopped\n")


def test_a_deferred_one_stops_what_looks_at_it_alone() -> None:
    process = run(DEFERRED)
    press(process)
    press(process)
    assert process.communicate(timeout=30) == ("", "stopped\n")
    assert process.returncode == 130


def test_it_comes_too_late_when_the_work_is_done() -> None:
    process = run(FINISHED)
    assert process.stdout is not None
    process.stdout.readline()
    press(process)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


def test_a_background_job_ignores_it() -> None:
    program = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + BEGIN + "ready(); time.sleep(1)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    press(process)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


def test_nothing_is_raised_within_an_import(tmp_path: Path) -> None:
    """There an extension may print it, lose it or crash."""
    (tmp_path / "extension.py").write_text(EXTENSION)
    process = run(f"sys.path.insert(0, {str(tmp_path)!r}); import extension; interrupts.finish()")
    press(process)
    assert process.communicate(timeout=30) == ("", "stopped\n")
    assert process.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize("moments", [1, pytest.param(40, marks=pytest.mark.full)])
def test_at_random_moments_of_a_command(tmp_path: Path, moments: int) -> None:
    """Python's own start, before any line of ours, is left out."""
    for one in interrupt_often(tmp_path, moments=moments, seed=0, since=0.5):
        assert one.stopped or one.finished, str(one)
        assert one.seconds < 10  # 1.5 s where nothing else runs
