"""The two threads that read the data socket: nothing is left lying when one takes the other's place."""

import threading

from modelhostd.worker.readers import Readers, Received
from tests.support import wait_until
from tests.worker.harness import DEADLINE_S


def test_what_one_leaves_that_has_lost_its_place_is_others_to_run():
    """While it ran a slow request the other took over; what is left when it comes back is called out."""
    calls, over, given = [], threading.Event(), threading.Event()
    readers = Readers(lambda: calls.append(threading.current_thread().name))

    def receive(*, wait, serves):
        del wait
        if serves and not given.is_set():
            given.set()
            return Received.QUICK
        if not given.is_set():
            return Received.NOTHING
        assert over.wait(DEADLINE_S)
        return Received.END

    def serve():
        # Until the other has taken over. Meanwhile something came that only this one's model can take.
        wait_until(lambda: len(calls) == 1)
        return True

    threads = [
        threading.Thread(target=readers.run, args=(index, receive, serve), name=f"reader-{index}")
        for index in range(2)
    ]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: calls == ["reader-1", "reader-0"])
    finally:
        over.set()
        for thread in threads:
            thread.join(DEADLINE_S)
