"""The framing codec: any chunking gives the same frames, garbage is refused at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.worker.wire import frames
from modelhostd.worker.wire.frames import Decoder, Frame, Kind, ProtocolError

KINDS = frozenset(Kind)

some_frames = st.lists(
    st.builds(
        Frame,
        kind=st.sampled_from(sorted(KINDS)),
        flags=st.integers(0, 7),
        request=st.integers(0, 2**64 - 1),
        generation=st.integers(0, 2**64 - 1),
        header=st.binary(max_size=200),
        payload=st.binary(max_size=2_000),
    ),
    max_size=6,
)


def encoded(sent):
    """Return the stream that carries these frames."""
    return b"".join(frames.encode(*frame[:5], payload=frame.payload) for frame in sent)


@given(some_frames, st.data())
def test_any_chunking_gives_the_frames_that_were_sent(sent, data):
    """However a stream is cut, the decoder returns the same frames in the same order."""
    stream = encoded(sent)
    decoder = Decoder(KINDS)
    got = []
    position = 0
    while position < len(stream):
        step = data.draw(st.integers(1, len(stream) - position))
        got += decoder.feed(stream[position : position + step])
        position += step
    assert got == sent
    assert decoder.pending == 0


@given(some_frames)
def test_single_bytes_give_the_frames_that_were_sent(sent):
    """A stream that arrives byte by byte is the same stream."""
    decoder = Decoder(KINDS)
    got = []
    for byte in encoded(sent):
        got += decoder.feed(bytes([byte]))
    assert got == sent


@given(st.binary(max_size=3_000), st.integers(1, 500))
def test_garbage_is_refused_or_kept_within_one_frame(garbage, step):
    """Random bytes end in a ProtocolError, or leave no more behind than one frame can hold."""
    decoder = Decoder(KINDS)
    try:
        for position in range(0, len(garbage), step):
            decoder.feed(garbage[position : position + step])
    except ProtocolError:
        with pytest.raises(ProtocolError):
            decoder.feed(b"")
    limit = frames.FIXED_BYTES + frames.MAX_HEADER_BYTES + frames.MAX_PAYLOAD_BYTES
    assert decoder.pending <= limit


@given(some_frames, st.integers(0, 27), st.integers(1, 255))
def test_a_flipped_byte_in_the_fixed_header_never_raises_anything_else(sent, where, flip):
    """Whatever byte of a fixed header is wrong, the decoder answers frames or ProtocolError."""
    stream = bytearray(encoded([*sent, Frame(Kind.REQUEST, 1, 2, 3, b"h", b"p")]))
    stream[where] ^= flip
    decoder = Decoder(KINDS)
    try:
        decoder.feed(bytes(stream))
    except ProtocolError:
        return
    assert decoder.pending <= len(stream)


def test_a_huge_length_is_refused_before_its_bytes_are_waited_for():
    """A payload length over the limit breaks the stream as soon as the fixed header is there."""
    good = bytearray(frames.encode(Kind.REQUEST, 0, 1, 1))
    good[8:12] = (2**32 - 1).to_bytes(4, "little")
    with pytest.raises(ProtocolError, match="4294967295"):
        Decoder(KINDS).feed(bytes(good))


@pytest.mark.parametrize("kind", [0, 7, 99, Kind.LOAD], ids=str)
def test_a_kind_that_this_socket_does_not_carry_is_refused(kind):
    """Each end of each socket takes only the kinds that belong there."""
    with pytest.raises(ProtocolError, match="kind"):
        Decoder(frames.DATA_FROM_WORKER).feed(frames.encode(kind, 0, 1, 1))


@pytest.mark.parametrize("size", [frames.MAX_PAYLOAD_BYTES, frames.MAX_PAYLOAD_BYTES + 1], ids=str)
def test_the_encoder_keeps_to_the_limits_that_the_decoder_has(size):
    """What is encoded can be decoded: the limit itself passes, one byte more is refused here."""
    if size > frames.MAX_PAYLOAD_BYTES:
        with pytest.raises(ProtocolError):
            frames.encode(Kind.REQUEST, 0, 1, 1, payload=bytes(size))
    else:
        stream = frames.encode(Kind.REQUEST, 0, 1, 1, payload=bytes(size))
        assert len(Decoder(KINDS).feed(stream)[0].payload) == size
