"""A worker that breaks the protocol, in the way that the variable HOSTILE names.

Started in place of the interpreter, with the same command line; it greets and loads as a good one
does (where it gets that far) and misbehaves at the first request.
"""

import argparse
import os
import random
import socket
import sys
import time

sys.path += [word.partition("=")[2] for word in sys.argv if word.startswith(("--code=", "--path="))]

from modelhostd.worker.v1 import worker_pb2
from modelhostd.worker.wire import frames
from modelhostd.worker.wire.frames import Decoder, Kind

MODE = os.environ["HOSTILE"]


def main():
    """Behave until the first request, then do what HOSTILE says."""
    parser = argparse.ArgumentParser()
    for name in ("control", "data"):
        parser.add_argument(f"--{name}", type=int)
    arguments, _ = parser.parse_known_args()
    control = socket.socket(fileno=arguments.control)
    data = socket.socket(fileno=arguments.data)
    decoder = Decoder(frames.CONTROL_TO_WORKER)
    loaded = False
    while not loaded:
        for frame in decoder.feed(control.recv(65536)):
            loaded = answer(control, frame)
    decoder = Decoder(frames.DATA_TO_WORKER)
    request = None
    while request is None:
        came = decoder.feed(data.recv(65536))
        request = next((frame for frame in came if frame.kind == Kind.REQUEST), None)
    if MODE == "control-garbage":
        control.sendall(bytes(random.Random(1).randbytes(4096)))
    try:
        misbehave(data, request)
    except OSError:
        return
    time.sleep(3600)


def answer(control, frame):
    """Answer a command as a good worker does; return whether it was the load."""
    if frame.kind == Kind.HELLO:
        if MODE == "silent":
            time.sleep(3600)
        if MODE == "exit-early":
            sys.stderr.write("cannot start\n")
            os._exit(1)
        version = 99 if MODE == "version" else frames.PROTOCOL_VERSION
        hello = worker_pb2.HelloResponse(protocol_version=version, pid=os.getpid())
        body = b"\xff\xff\xff" if MODE == "bad-hello" else hello.SerializeToString()
        control.sendall(frames.encode(Kind.HELLO, frames.FINAL, frame.request, 0, body))
        return False
    kind = Kind.CHECKED if MODE == "wrong-answer" else Kind.LOADED
    body = b"\xff\xff\xff" if MODE == "bad-loaded" else b""
    control.sendall(frames.encode(kind, frames.FINAL, frame.request, frame.generation, body))
    return True


def misbehave(data, request):
    """Break the protocol on the data socket."""
    number, generation = request.request, request.generation

    def response(flags, number=number, header=None, payload=b""):
        body = header.SerializeToString() if header is not None else b""
        return frames.encode(Kind.RESPONSE, flags, number, generation, body, payload=payload)

    if MODE == "garbage":
        data.sendall(random.Random(2).randbytes(100_000))
    elif MODE == "huge-length":
        frame = bytearray(response(frames.FINAL))
        frame[8:12] = (2**32 - 1).to_bytes(4, "little")
        data.sendall(frame)
    elif MODE == "wrong-id":
        data.sendall(response(frames.FINAL, number=number + 100))
    elif MODE == "twice":
        data.sendall(response(frames.FINAL) + response(frames.FINAL))
    elif MODE == "not-final":
        data.sendall(response(0))
    elif MODE == "slot-outside":
        header = worker_pb2.ResponseHeader(slot_offset=2**40, slot_length=2**20)
        data.sendall(response(frames.FINAL | frames.ARENA, header=header))
    elif MODE == "bad-header":
        data.sendall(frames.encode(Kind.RESPONSE, frames.FINAL, number, generation, b"\xff\xff"))
    elif MODE == "endless":
        part = response(frames.MORE, payload=bytes(frames.MAX_PAYLOAD_BYTES))
        while True:
            data.sendall(part)
    elif MODE == "flood":
        part = response(0) * 1000
        while True:
            data.sendall(part)
    elif MODE == "close":
        data.close()
    elif MODE == "half":
        data.sendall(response(frames.FINAL)[:-1])
        os._exit(0)


main()
