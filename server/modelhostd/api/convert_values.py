"""Names, times and errors in the form of the wire.

Names there are full (``models/minilm``); inside they are ids. A time of 0.0 is an unset Timestamp, a
duration of None an unset Duration.
"""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from modelhost.v1 import errors_pb2
from modelhostd.core.errors import REASONS, Reason
from modelhostd.core.resources import Kind, StoredError


def name_of(kind: Kind, key: str) -> str:
    """Return the resource name of a key: (INSTANCE, ``minilm/3``) -> ``models/minilm/instances/3``."""
    if kind is Kind.INSTANCE:
        model, _, instance = key.partition("/")
        return instance_name(model, instance)
    return "settings" if kind is Kind.SETTINGS else f"{kind.value}/{key}"


def instance_name(model: str, instance: str) -> str:
    """Return the resource name of an instance."""
    return f"models/{model}/instances/{instance}"


def named(collection: str, key: str) -> str:
    """Return the resource name of an id; an empty id stays empty."""
    return f"{collection}/{key}" if key else ""


def timestamp(time: float) -> Timestamp | None:
    """Return seconds since the epoch as a Timestamp; 0.0 is no time."""
    if not time:
        return None
    nanos = round(time * 1e9)
    return Timestamp(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def duration(seconds: float | None) -> Duration | None:
    """Return seconds as a Duration; None is no duration."""
    if seconds is None:
        return None
    made = Duration()
    made.FromNanoseconds(round(seconds * 1e9))
    return made


def error(stored: StoredError) -> errors_pb2.Error:
    """Return an error as a resource remembers it."""
    code = REASONS[Reason(stored.reason)].code if stored.reason in Reason.__members__ else 0
    return errors_pb2.Error(
        reason=stored.reason,
        code=errors_pb2.Error.Code.ValueType(int(code)),
        message=stored.message,
        metadata=stored.metadata,
        retry_delay=duration(stored.retry_delay_s),
    )
