"""The worker's own threads: none dies unseen, for what it was to answer would be waited for in vain."""

import os
import threading
from collections.abc import Callable

LOST_EXIT = 71
"""The worker ended because one of its own threads did."""

LOST_AFTER_S = 15.0
LOOKS = 5
"""A thread that has not begun so long, and in so many looks, is lost: a process that was stopped looks only once."""


class _Own(threading.Thread):
    """A thread whose end by an exception ends the worker."""

    looks = 0
    since_s = 0.0

    def run(self) -> None:
        _starting.remove(self)
        super().run()


_starting: list[_Own] = []


def start_thread(run: Callable[..., object], *arguments: object, name: str) -> threading.Thread:
    """Run a function in a thread of the worker's own; a process that ends does not wait for it."""
    thread = _Own(target=run, args=arguments, name=name, daemon=True)
    _starting.append(thread)
    try:
        thread.start()
    except RuntimeError:  # The system gives no thread.
        _starting.remove(thread)
        raise
    return thread


def end_with_threads() -> None:
    """Have this process end with :data:`LOST_EXIT` when one of its own threads dies of an exception.

    Threads of libraries may: their exceptions are only reported.
    """
    report = threading.excepthook

    def died(arguments: threading.ExceptHookArgs) -> None:
        try:
            report(arguments)
        finally:
            if isinstance(arguments.thread, _Own):
                os._exit(LOST_EXIT)

    threading.excepthook = died


def look_for_lost(now_s: float) -> None:
    """End this process with :data:`LOST_EXIT` if a thread does not begin; to be called at every heartbeat.

    Without memory a thread can die before its first line: no hook of Python's sees that, and who starts it may
    wait in ``Thread.start`` for ever. ``now_s`` is monotonic.
    """
    for thread in _starting:
        thread.looks += 1
        if thread.looks == 1:
            thread.since_s = now_s
        elif thread.looks > LOOKS and now_s - thread.since_s > LOST_AFTER_S:
            os._exit(LOST_EXIT)
