"""Request ids: what makes a call safe to repeat, also over a restart."""

from collections import OrderedDict
from collections.abc import Iterable

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.values import dataclass
from modelhostd.ports import RequestRecord

REQUESTS_MAX = 10_000
REQUEST_AGE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Request:
    """A caller's request id and a fingerprint of what it asked (method and content)."""

    id: str
    fingerprint: str


class Requests:
    """The newest answers by request id; each counts for an hour."""

    def __init__(self, records: Iterable[RequestRecord] = ()) -> None:
        self._records: OrderedDict[str, RequestRecord] = OrderedDict(
            (record.request_id, record) for record in records
        )

    def remember(self, request: Request, answer: str, now: float) -> RequestRecord:
        """Note the answer to a request, which its commit makes durable."""
        record = RequestRecord(request.id, request.fingerprint, answer, now)
        self._records.pop(request.id, None)
        self._records[request.id] = record
        while len(self._records) > REQUESTS_MAX:
            self._records.popitem(last=False)
        return record

    def forget(self, record: RequestRecord) -> None:
        """Take back an answer whose commit failed: the request may be made again."""
        if self._records.get(record.request_id) is record:
            del self._records[record.request_id]

    def find(self, request: Request, now: float) -> RequestRecord | None:
        """Return the answer given to this request within the last hour.

        Raises REQUEST_ID_REUSED when the id came with other content.
        """
        record = self._records.get(request.id)
        if record is None or now - record.time > REQUEST_AGE_S:
            return None
        if record.fingerprint != request.fingerprint:
            raise ModelhostError(
                Reason.REQUEST_ID_REUSED,
                f"request id '{request.id}' was used for another request within the last hour; "
                f"make a new id (UUID4) for each request",
                {"requestId": request.id},
            )
        return record
