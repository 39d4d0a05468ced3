"""grpc.health.v1 by hand: its two messages have one field each, and its stubs are a dependency.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md.
"""

METHOD = "/grpc.health.v1.Health/Check"

_STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
_SERVICE_TAG = b"\x0a"  # field 1, length-delimited
_STATUS_TAG = 0x08  # field 1, varint


def encode_request(service: str) -> bytes:
    """Return a HealthCheckRequest for a service's full name; empty = the daemon as a whole."""
    name = service.encode()
    assert len(name) < 128, "one byte of length"
    return _SERVICE_TAG + bytes([len(name)]) + name if name else b""


def decode_response(raw: bytes) -> str:
    """Return the status of a HealthCheckResponse; UNKNOWN for anything else."""
    if len(raw) >= 2 and raw[0] == _STATUS_TAG and raw[1] < len(_STATUSES):
        return _STATUSES[raw[1]]
    return _STATUSES[0]
