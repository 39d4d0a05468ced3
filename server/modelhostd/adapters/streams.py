"""The bytes of one file, by one connection or by several side by side, gone on with after every cut.

A short rest comes by one connection, in the caller's thread, hashed on the way. A long one is cut into
pieces, handed out from the front: connections are added while that makes it faster, and a thread beside
them hashes. Whoever fails while others go on makes one connection less; only the last one's failure is
waited out.
"""

import threading
import time
from collections.abc import Callable

from modelhostd.adapters.blobs import Stopped
from modelhostd.adapters.hashing import (
    BUFFER_BYTES,
    BUFFER_BYTES_BESIDE,
    TICK_S,
    Hasher,
    HashThread,
)
from modelhostd.adapters.parts import Part
from modelhostd.adapters.retries import Patience
from modelhostd.adapters.source import Body, Changed, mismatch
from modelhostd.adapters.transfer import Transfer
from modelhostd.adapters.wire import Transient, bad_reply
from modelhostd.core.errors import ModelhostError
from modelhostd.core.paths import printable
from modelhostd.core.ramp import Ramp
from modelhostd.core.resources import Retry
from modelhostd.core.spans import Span, next_piece
from modelhostd.ports import RemoteFile

GAIN_BYTES_MIN = 64 << 10
"""A failure after fewer bytes does not start the count of tries anew: a drip must end."""
ATTEMPTS_MAX = 1000
RESTARTS_MAX = 3
"""How often a file may change at the source while it is fetched."""
BEHIND_BYTES_MAX = 256 << 20
"""How far the hashing may fall behind before more connections are of no use. Pieces of several connections may be
closed all at once, 8 of 32 MiB: that alone is no reason."""


class _NoRanges(Exception):
    """The source gave the whole file where a piece was asked for."""


class FileStreams:
    """The attempts at one file."""

    def __init__(self, transfer: Transfer, file: RemoteFile, part: Part, hasher: Hasher) -> None:
        self._transfer = transfer
        self._file = file
        self._part = part
        self._hasher = hasher
        self._reader = transfer.adapter.reader(
            transfer.connections, transfer.source, transfer.revision, file
        )
        self._patience = Patience(
            transfer.adapter.retry,
            transfer.canceller,
            lambda retry: transfer.meter.retrying(file.path, retry),
        )
        streams = transfer.streams
        self._ramp = Ramp(streams.connections, streams.connections_first)
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._bringing: set[threading.Thread] = set()
        """Those that have brought something."""
        self._taken: list[Span] = []
        self._failure: BaseException | None = None
        self._over = False
        self._waiting = False
        self._not_before = 0.0
        self._told: ModelhostError | None = None
        """Why nobody asks before that; ``_shown`` once all wait."""
        self._shown = False
        self._before = 0
        """Bytes done at the last failure."""
        self._failures = 0
        self._hashing: HashThread
        """Where there are several connections."""

    def run(self) -> None:
        """Bring every byte to disk and through the hasher, or raise when patience ends."""
        for _ in range(RESTARTS_MAX):
            streams, left = self._transfer.streams, self._file.size_bytes - self._part.done_bytes
            ranged = left >= streams.ranged_bytes and self._ramp.limit > 1
            self._over, self._failure = False, None
            try:
                if ranged:
                    self._side_by_side()
                else:
                    self._one_by_one()
                self._hasher.catch_up(self._file.size_bytes)
            except Changed:
                self._transfer.meter.restarted()
            except _NoRanges:
                assert ranged
            else:
                return
            # One answer is of one version: no pieces of several from now on.
            self._ramp = Ramp(1)
            self._restart()
        cause = f"{printable(self._file.path)} changes while it is fetched"
        raise bad_reply(self._transfer.source.uri, cause)

    def _restart(self) -> None:
        self._part.restart()
        self._hasher.restart()
        self._before = 0

    # --- one connection ----------------------------------------------------------------------------

    def _one_by_one(self) -> None:
        size = self._file.size_bytes
        while (piece := next_piece(self._part.done, (), size, max(1, size))) is not None:
            self._hasher.catch_up(self._part.prefix)
            try:
                body = self._reader.open(*piece)
                if body.start != piece[0]:
                    assert body.start == 0, body.start
                    self._restart()
                self._copy(body, body.end, self._alone)
            except Transient as failure:
                self._wait(failure)

    def _alone(self, offset: int, buffer: memoryview, count: int) -> memoryview:
        if self._part.prefix >= offset + count:
            self._hasher.feed(offset, buffer[:count])
        self._part.sync_if_due()
        return buffer

    def _wait(self, failure: Transient) -> None:
        """Wait after a failure, or raise it."""
        self._failures += 1
        done = self._part.done_bytes
        if self._failures > ATTEMPTS_MAX:
            cause = f"{printable(self._file.path)} did not end"
            raise bad_reply(self._transfer.source.uri, cause)
        gained = done - self._before >= GAIN_BYTES_MIN
        self._before = done
        self._patience.failed(failure, gained=gained)

    def _copy(
        self, body: Body, end: int, came: Callable[[int, memoryview, int], memoryview]
    ) -> None:
        """Write a body that should reach from its start to ``end``.

        ``came`` takes the offset, the buffer and how much of it is on disk; it returns the buffer to go on with.
        """
        transfer, part, path = self._transfer, self._part, self._file.path
        canceller, tap, meter = transfer.canceller, transfer.tap, transfer.meter
        buffer = self._buffer()
        offset = body.start
        try:
            while True:
                allowed = tap.take(len(buffer), canceller)
                count = body.read_into(buffer[:allowed])
                tap.give_back(allowed - count)
                if count == 0:
                    break
                if offset + count > end:
                    if end == self._file.size_bytes:
                        raise mismatch(self._file, f"{end} bytes", "more")
                    raise Transient(bad_reply(transfer.source.uri, "more than was asked for"))
                done = part.write(offset, buffer[:count])
                transfer.written(count)
                meter.advance(path, done)
                self._patience.goes_on()
                buffer = came(offset, buffer, count)
                offset += count
                canceller.check()
                if self._over and offset < end:
                    raise Stopped
        except BaseException:
            body.close()
            raise
        if offset < end:
            cause = f"the body ended at byte {offset} of {end}"
            raise Transient(bad_reply(transfer.source.uri, cause))

    def _buffer(self) -> memoryview:
        """Return a buffer with room for one byte more than the file has: what is too much shows."""
        most = BUFFER_BYTES if len(self._threads) <= 1 else BUFFER_BYTES_BESIDE
        return memoryview(bytearray(min(most, self._file.size_bytes + 1)))

    # --- several connections -----------------------------------------------------------------------

    def _side_by_side(self) -> None:
        hashing = self._hashing = HashThread(self._hasher, self._part, self._fail)
        hashing.start(self._buffer())
        try:
            self._coordinate()
        except BaseException as error:
            self._fail(error)
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()
            for thread in self._threads:
                thread.join()
            hashing.stop()
            self._threads.clear()
            self._bringing.clear()
        if self._failure is not None:
            raise self._failure

    def _coordinate(self) -> None:
        """Start connections as the ramp says, sync what is due; returns when all is there, or failed."""
        size = self._file.size_bytes
        while True:
            self._part.sync_if_due()
            with self._changed:
                self._changed.notify_all()
                whole = self._part.prefix == size and not self._threads
                if self._failure is not None or whole:
                    return
                if not self._waiting:
                    wanted = self._wanted()
                    while len(self._threads) < wanted and self._piece() is not None:
                        if self._threads and not self._transfer.places.take():
                            break
                        self._start()
                self._changed.wait(TICK_S)
            self._transfer.canceller.check()

    def _wanted(self) -> int:
        """Return how many connections there should be: no more while the hashing cannot keep up."""
        if self._part.prefix - self._hasher.position > BEHIND_BYTES_MAX:
            self._ramp.enough(time.monotonic())
        all_bring = self._bringing.issuperset(self._threads)
        return self._ramp.sample(time.monotonic(), self._part.done_bytes, all_bring=all_bring)

    def _start(self) -> None:
        extra = bool(self._threads)
        thread = threading.Thread(
            target=self._work, args=(extra,), name="modelhost-transfer", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _piece(self) -> Span | None:
        streams, size = self._transfer.streams, self._file.size_bytes
        return next_piece(self._part.done, self._taken, size, streams.piece(size))

    def _work(self, extra: bool) -> None:
        """Fetch pieces until there are none, or one connection less is wanted."""
        try:
            while (piece := self._take()) is not None:
                try:
                    self._fetch(piece)
                except Transient as failure:
                    if not self._stays(failure):
                        break
                finally:
                    with self._changed:
                        self._taken.remove(piece)
        except BaseException as error:
            self._fail(error)
        finally:
            if extra:
                self._transfer.places.give_back()
            with self._changed:
                self._leave()
                self._changed.notify_all()

    def _leave(self) -> None:
        """Be no longer among the connections, in the same step that decides so: the last one stays."""
        if not self._over and threading.current_thread() in self._threads:
            self._threads.remove(threading.current_thread())
            self._bringing.discard(threading.current_thread())

    def _take(self) -> Span | None:
        with self._changed:
            while not self._over and self._failure is None:
                if len(self._threads) > max(1, self._ramp.wanted):
                    self._leave()
                    return None
                pause = self._not_before - time.monotonic()
                self._show(pause)
                if pause <= 0:
                    piece = self._piece()
                    if piece is not None:
                        self._taken.append(piece)
                    return piece
                self._changed.wait(min(pause, TICK_S))
                self._transfer.canceller.check()
        return None

    def _show(self, pause_s: float) -> None:
        """Show, once, what all wait for since one was told so; and that it is over."""
        told, shown, path = self._told, self._shown, self._file.path
        if pause_s <= 0:
            self._told, self._shown = None, False
            if shown:
                self._transfer.meter.retrying(path, None)
        elif told is not None and not shown and not self._taken:
            self._shown = True
            retry = Retry(1, told.reason.value, told.message, time.time() + pause_s)
            self._transfer.meter.retrying(path, retry)

    def _fetch(self, piece: Span) -> None:
        body = self._reader.open(*piece)
        if body.start != piece[0] or body.end > piece[1]:
            with self._changed:
                first = body.start == 0 and len(self._threads) == 1 and not self._part.done_bytes
                self._ramp = Ramp(1)
                if first:
                    # All of it comes, and nothing else has begun: so be it.
                    self._taken[:] = [piece, (0, body.end)]
            if not first:
                body.close()
                raise _NoRanges
            try:
                self._copy(body, body.end, self._beside)
            finally:
                with self._changed:
                    self._taken.remove((0, body.end))
            return
        self._copy(body, piece[1], self._beside)

    def _beside(self, offset: int, buffer: memoryview, count: int) -> memoryview:
        """Hand over what may be hashed, and keep what is not synced within bounds."""
        self._bringing.add(threading.current_thread())
        spare = self._hashing.swap(offset, buffer, count)
        due = self._transfer.store.config.sync_bytes
        if self._part.unsynced_bytes >= due:
            with self._changed:
                self._changed.notify_all()
                while self._part.unsynced_bytes >= 2 * due and not self._over:
                    self._changed.wait(TICK_S)
        return spare

    def _stays(self, failure: Transient) -> bool:
        """Tell whether a connection that failed is the last one, after it has waited as it must.

        Raises what the server said where it wants a longer wait than any: the others would begin it.
        """
        with self._changed:
            pause_s = failure.retry_after_s
            if pause_s is not None:
                if pause_s > self._transfer.adapter.retry.retry_after_cap_s:
                    raise failure.error from failure
                self._not_before = max(self._not_before, time.monotonic() + pause_s)
                self._told, self._shown = failure.error, False
            if len(self._threads) > 1:
                self._ramp.failed(time.monotonic())
                self._leave()
                return False
            self._waiting = True
        try:
            self._wait(failure)
        finally:
            with self._changed:
                self._waiting = False
        return True

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._failure is None or isinstance(self._failure, Stopped):
                self._failure = error
            self._over = self._over or not isinstance(error, Stopped)
            self._changed.notify_all()
        if not isinstance(error, Stopped | Changed | _NoRanges):
            # The download ends with this file; its other threads need not wait for their servers.
            self._transfer.canceller.cancel()
