"""The worker's own threads: none dies unseen, for what it was to answer would be waited for in vain."""

import os
import threading
from collections.abc import Callable

LOST_EXIT = 71
"""The worker ended because one of its own threads did."""

LOOKS = 5
"""How often a thread may be found not to have begun; the looks are heartbeats apart."""


class _Own(threading.Thread):
    """A thread whose end by an exception ends the worker."""

    looks = 0

    def run(self) -> None:
        _starting.remove(self)
        super().run()


_starting: list[_Own] = []


def start_thread(run: Callable[..., object], *arguments: object, name: str) -> None:
    """Run a function in a thread of the worker's own; a process that ends does not wait for it."""
    thread = _Own(target=run, args=arguments, name=name, daemon=True)
    _starting.append(thread)
    try:
        thread.start()
    except RuntimeError:  # The system gives no thread.
        _starting.remove(thread)
        raise


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


def look_for_lost() -> None:
    """End this process with :data:`LOST_EXIT` if a thread has not begun in :data:`LOOKS` calls of this function.

    Without memory a thread can die before its first line: no hook of Python's sees that, and who starts it may
    wait in ``Thread.start`` for ever.
    """
    for thread in _starting:
        thread.looks += 1
        if thread.looks > LOOKS:
            os._exit(LOST_EXIT)
