"""Messages put together from parts that are encoded already.

Source: https://protobuf.dev/programming-guides/encoding/
"""


def key(number: int) -> int:
    """Return the key of a field that holds a message, below field 16."""
    assert 0 < number < 16
    return number << 3 | 2


def entry(field_key: int, data: bytes) -> bytes:
    """Return one field that holds a message: its key, its length, its bytes."""
    length = len(data)
    head = bytearray([field_key])
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head) + data
