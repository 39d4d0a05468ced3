"""Damaged messages by the ten thousand: made cheaply, out of the bytes of requests that work.

Most of them are framed well, so that they get past the parsers' first look.
"""

import gzip
import random
from collections.abc import Iterator, Mapping, Sequence

from google.protobuf.message import Message

from modelhost.oip import open_inference_pb2 as oip
from tests.hostile.messages import varint

LARGE_SHARE = 100
"""One in so many messages is large: such take a hundred times as long."""

_SIZES = {"BOOL": 1, "UINT8": 1, "INT16": 2, "BF16": 2, "FP16": 2, "FP32": 4, "INT64": 8, "FP64": 8}


def raw(model: str, tensors: Sequence[tuple[str, int]]) -> oip.ModelInferRequest:
    """Make a request that works: tensors as raw contents, and everything beside them."""
    made = oip.ModelInferRequest(model_name=model, id="7", model_version="1")
    for number, (datatype, count) in enumerate(tensors):
        made.inputs.add(name=f"in{number}", datatype=datatype, shape=[count, 1])
        made.raw_input_contents.append(bytes(count * _SIZES[datatype]))
    made.parameters["priority"].uint64_param = 3
    made.outputs.add(name="in0")
    return made


def texts(model: str) -> oip.ModelInferRequest:
    """Make a request that works: BYTES as raw contents."""
    made = oip.ModelInferRequest(model_name=model)
    made.inputs.add(name="t", datatype="BYTES", shape=[3])
    elements = (b"one", b"", b"three")
    made.raw_input_contents.append(b"".join(len(e).to_bytes(4, "little") + e for e in elements))
    return made


def typed_contents(model: str) -> oip.ModelInferRequest:
    """Make a request that works: contents of their own types, and parameters of each kind."""
    made = oip.ModelInferRequest(model_name=model, id="typed")
    made.inputs.add(name="f", datatype="FP32", shape=[2]).contents.fp32_contents.extend([1.0, 2.0])
    made.inputs.add(name="i", datatype="INT8", shape=[2]).contents.int_contents.extend([-1, 9])
    made.inputs.add(name="b", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
    made.outputs.add(name="f").parameters["classification"].int64_param = 1
    made.parameters["timeout"].int64_param = 5_000_000
    made.parameters["mine"].string_param = "x"
    made.parameters["half"].double_param = 0.5
    made.parameters["yes"].bool_param = True
    return made


def of_inference(model: str) -> Sequence[bytes]:
    """Return requests for ModelInfer that work, the last two of them large."""
    made = [
        raw(model, [("FP32", 4)]),
        raw(model, [("UINT8", 3), ("BOOL", 2), ("FP16", 1)]),
        raw(model, [("INT16", 0), ("BF16", 5), ("FP64", 1), ("INT64", 1)]),
        texts(model),
        typed_contents(model),
    ]
    small = [one.SerializeToString() for one in made]
    by_frame = raw(model, [("FP32", 6_000)]).SerializeToString()
    by_arena = raw(model, [("FP32", 30_000)]).SerializeToString()
    return [*small, by_frame, by_arena]


def of_control(model: str) -> Mapping[str, Sequence[Message]]:
    """Return requests for each other method of the service that work, or are refused in type."""
    load = oip.RepositoryModelLoadRequest(model_name=model)
    config = oip.RepositoryModelLoadRequest(model_name=model)
    config.parameters["config"].string_param = '{"max_batch_size": 4, "priority": 3}'
    unload = oip.RepositoryModelUnloadRequest(model_name=model)
    unload.parameters["unload_dependents"].bool_param = True
    trace = oip.TraceSettingRequest(model_name=model)
    trace.settings["trace_level"].value.append("TENSORS")
    log = oip.LogSettingsRequest()
    log.settings["log_verbose_level"].uint32_param = 1
    region = oip.SystemSharedMemoryRegisterRequest(name="r", key="/k", offset=8, byte_size=64)
    handle = oip.CudaSharedMemoryRegisterRequest(name="r", raw_handle=bytes(64), byte_size=64)
    return {
        "ServerLive": [oip.ServerLiveRequest()],
        "ServerReady": [oip.ServerReadyRequest()],
        "ServerMetadata": [oip.ServerMetadataRequest()],
        "ModelReady": [oip.ModelReadyRequest(name=model, version="1")],
        "ModelMetadata": [oip.ModelMetadataRequest(name=model, version="1")],
        "ModelConfig": [oip.ModelConfigRequest(name=model, version="1")],
        "ModelStatistics": [oip.ModelStatisticsRequest(name=model, version="1")],
        "RepositoryIndex": [oip.RepositoryIndexRequest(ready=True)],
        "RepositoryModelLoad": [load, config],
        "RepositoryModelUnload": [unload],
        "SystemSharedMemoryStatus": [oip.SystemSharedMemoryStatusRequest(name="r")],
        "SystemSharedMemoryRegister": [region],
        "SystemSharedMemoryUnregister": [oip.SystemSharedMemoryUnregisterRequest(name="r")],
        "CudaSharedMemoryStatus": [oip.CudaSharedMemoryStatusRequest(name="r")],
        "CudaSharedMemoryRegister": [handle],
        "CudaSharedMemoryUnregister": [oip.CudaSharedMemoryUnregisterRequest(name="r")],
        "TraceSetting": [trace],
        "LogSettings": [log],
    }


# --- damage -----------------------------------------------------------------------------------------

_WIRE_BYTES = {0: 0, 1: 8, 2: -1, 5: 4}
_EDGES = (*(varint(n) for n in (0, 127, 128, 2**31, 2**32, 2**63, 2**64 - 1)), b"\xff" * 11)


def damaged(whole: bytes, other: bytes, chance: random.Random) -> bytes:
    """Return a message that is not ``whole``: a third of them torn anywhere, the others still well framed."""
    while True:
        if chance.randrange(3):
            made = _reframed(whole, other, chance, 4)
        else:
            made = _torn(whole, other, chance)
        if made != whole:
            return gzip.compress(made, 1) if chance.randrange(20) == 0 else made


def _torn(whole: bytes, other: bytes, chance: random.Random) -> bytes:
    """Return bytes changed, cut, doubled, put in, or taken from ``other``."""
    made = bytearray(whole)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        at = chance.randrange(len(made) + 1)
        match chance.randrange(8):
            case 0 if made:
                made[at % len(made)] ^= 1 << chance.randrange(8)
            case 1 if made:
                made[at % len(made)] = chance.randrange(256)
            case 2:
                del made[at:]
            case 3:
                del made[at : at + chance.randrange(1, 9)]
            case 4:
                made[at:at] = made[at : at + chance.randrange(1, 40)]
            case 5:
                made[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 6:
                made[at : at + 1] = chance.choice(_EDGES)
            case _:
                cut = chance.randrange(len(other) + 1)
                made[at:] = other[cut:]
    return bytes(made)


def _reframed(whole: bytes, other: bytes, chance: random.Random, depth: int) -> bytes:
    """Return a message of which one field, or one in a field, is damaged, doubled, moved or gone.

    The lengths around it are those of what is there, so that parsers get down to it.
    """
    fields = _fields(whole)
    if not fields or depth == 0:
        return _torn(whole, other, chance)
    at = chance.randrange(len(fields))
    match chance.randrange(12):
        case 0:
            del fields[at]
        case 1:
            fields.insert(chance.randrange(len(fields) + 1), fields[at])
        case 2:
            fields.append(fields.pop(at))
        case 3 if theirs := _fields(other):
            fields.insert(at, chance.choice(theirs))
        case _:
            key, content = fields[at]
            if key[-1] & 7 == 2:
                fields[at] = key, _reframed(content, other, chance, depth - 1)
            else:
                fields[at] = key, chance.choice((*_EDGES, varint(chance.randrange(1 << 20))))
    return b"".join(
        key + (varint(len(content)) if key[-1] & 7 == 2 else b"") + content
        for key, content in fields
    )


def _fields(message: bytes) -> list[tuple[bytes, bytes]]:
    """Return keys (of one byte) and contents of a message; nothing where it is none."""
    found = []
    at, end = 0, len(message)
    while at < end:
        key, start = message[at : at + 1], at + 1
        if not 8 <= key[0] < 0x80 or key[0] & 7 not in _WIRE_BYTES:
            return []
        size = _WIRE_BYTES[key[0] & 7]
        if size == 0:  # a number: up to its last byte
            at = start
            while at < end and message[at] >= 0x80:
                at += 1
            at += 1
        elif size < 0:
            length = shift = 0
            while start < end:
                length |= (message[start] & 0x7F) << shift
                shift, start = shift + 7, start + 1
                if message[start - 1] < 0x80:
                    break
            at = start + length
        else:
            at = start + size
        if at > end:
            return []
        found.append((key, message[start:at]))
    return found


def stream_of(good: Sequence[bytes], count: int, chance: random.Random) -> Iterator[bytes]:
    """Yield ``count`` damaged messages; the last two of ``good`` are large."""
    small, large = good[:-2] or good, good[-2:]
    for number in range(count):
        some = large if number % LARGE_SHARE == 0 else small
        yield damaged(chance.choice(some), chance.choice(small), chance)
