"""A thread of the worker's own that dies takes the worker with it; one of a library does not."""

import subprocess
import sys

import pytest

from modelhostd.worker.own_threads import LOST_EXIT

WAIT_S = 60.0
START = """
import _thread, threading
from modelhostd.worker import own_threads
own_threads.end_with_threads()
def fail():
    raise MemoryError
def wait():
    threading.Event().wait(2 * 60)
"""


def run(program: str) -> "subprocess.CompletedProcess[str]":
    """Run a program in a process of its own until it ends."""
    command = [sys.executable, "-c", START + program]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


def test_a_thread_of_its_own_that_dies_ends_the_process() -> None:
    """What the thread was to answer would be waited for in vain: the process ends, and says of what."""
    ended = run("own_threads.start_thread(fail, name='load-1')\nwait()")
    assert ended.returncode == LOST_EXIT
    assert "load-1" in ended.stderr
    assert "MemoryError" in ended.stderr


def test_a_thread_that_died_before_its_first_line_ends_the_process() -> None:
    """Without memory a thread can die unseen, and who starts it waits for ever: looking for it finds it."""
    program = """
threading.Thread._bootstrap = fail
starter = lambda: own_threads.start_thread(wait, name='load-1')
_thread.start_new_thread(starter, ())
while not own_threads._starting: pass
for _ in range(100): own_threads.look_for_lost(1.0)
for _ in range(100): own_threads.look_for_lost(1.0 + own_threads.LOST_AFTER_S)
print("not yet", flush=True)
own_threads.look_for_lost(1.1 + own_threads.LOST_AFTER_S)
"""
    ended = run(program)
    assert ended.stdout == "not yet\n"
    assert ended.returncode == LOST_EXIT


def test_a_process_that_was_stopped_loses_no_thread() -> None:
    """A long time and one look say nothing: nobody ran meanwhile."""
    program = """
threading.Thread._bootstrap = fail
starter = lambda: own_threads.start_thread(wait, name='load-1')
_thread.start_new_thread(starter, ())
while not own_threads._starting: pass
own_threads.look_for_lost(1.0)
own_threads.look_for_lost(1000.0)
"""
    assert run(program).returncode == 0


@pytest.mark.parametrize(
    "program",
    [
        "thread = threading.Thread(target=fail); thread.start(); thread.join()",
        "own_threads.start_thread(print, name='load-1')",
        "class A:\n  def __del__(self): fail()\nA()",
    ],
    ids=["a library's thread", "a thread that ends", "a finalizer"],
)
def test_nothing_else_ends_the_process(program: str) -> None:
    """An exception in a thread of a library or in a finalizer is reported, and no more."""
    looks = (
        "while own_threads._starting: pass\nfor now in range(99): own_threads.look_for_lost(now)"
    )
    assert run(f"{program}\n{looks}").returncode == 0
