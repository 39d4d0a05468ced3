"""A client of a model in another worker: it asks all the time, and nothing may go wrong for it."""

import threading
from types import TracebackType
from typing import Self

import grpc

from bench.faulty_scene import CALL_S, Scene


class Bystander:
    """Asks a model from a thread of its own for as long as the block lasts."""

    def __init__(self, scene: Scene, model: str) -> None:
        self._scene = scene
        self._model = model
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bystander", daemon=True)
        self.answers = 0
        self.errors: list[grpc.RpcError] = []

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._scene.infer(self._model).result()
                self.answers += 1
            except grpc.RpcError as error:
                self.errors.append(error)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(CALL_S)
