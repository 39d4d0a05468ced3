# Made from modelhost/_async/files.py by generate_sync.py: do not edit, change that.
"""Files of models: brought from this machine, and compared with what their sources have."""

import os
from collections.abc import Iterable, Iterator
from functools import partial

from modelhost import _calls, _freshness, _names, _upload
from modelhost._errors import ModelhostError, NotFound
from modelhost._freshness import Compared, Freshness
from modelhost._progress import Report, reporter
from modelhost._sync.registry import Registry
from modelhost._upload import Sending
from modelhost.v1 import model_service_pb2, models_pb2

Request = model_service_pb2.UploadModelFilesRequest


class Files(Registry):
    """What ``Client`` does with files of this machine, and with the age of those of the host."""

    def upload(
        self,
        model: str,
        paths: Iterable[str | os.PathLike[str]],
        *,
        task: str = "",
        revision: str = "",
        include: Iterable[str] = (),
        exclude: Iterable[str] = (),
        progress: Report | bool | None = None,
        timeout: float | None = None,
    ) -> model_service_pb2.UploadModelFilesResponse:
        """Bring files of this machine to the host's disk as one new version of a model.

        ``paths`` are files, which keep their names, and folders, of which all is taken that is below
        them (but for names that begin with a dot). A model that is not registered is, without a source;
        ``task`` becomes that of a registered one, too. ``revision`` is what the version is to be called, by
        default a digest of its files. An upload that broke goes on from what is there when it is called again.

        ``progress`` True shows it on stderr; a callable is called with operations, from another thread
        in the synchronous client. ``timeout`` in seconds, None = no end of its own. Raises what
        UploadModelFiles fails with, InvalidArgument, and OSError for files that cannot be read.
        """
        files = self._transport.blocking(partial(_upload.gather, paths, include, exclude))
        name = _names.model_name(model)
        with reporter(progress) as report:
            sending = Sending(name, files, report)
            self._transport.blocking(sending.hash)
            try:
                known = self.get(model)
            except NotFound:
                self.add(None, _names.model_id(name), task=task)
            else:
                if task and task != known.task:
                    self.update(known.name, {"task": task})
            question = Request(model=name, start=Request.Start(dry_run=True))
            answer = self._upload(self._questions(question, sending), timeout)
            start = Request.Start(
                revision=revision,
                total_bytes=sending.answered(answer),
                request_id=_calls.make_request_id(),
            )
            try:
                done = self._upload(self._steps(Request(model=name, start=start), sending), timeout)
            except ModelhostError:
                if sending.error is None:
                    raise
            if sending.error is not None:
                raise sending.error
            return done

    def outdated(self, models: Iterable[str] = ()) -> Iterator[Compared]:
        """Compare models (by default all) with what their sources have; yield each as it is known.

        Sources are asked one after another, each once, for at most the client's timeout. One that
        cannot be asked stops nothing: ``Compared.error`` says why. Raises NotFound for a model that is
        not there.
        """
        names = list(models)
        found = [self.get(name) for name in names] if names else self.models()
        asked: dict[bytes, str | ModelhostError] = {}
        for model in found:
            if not model.source.uri:
                have = _freshness.on_disk(model)
                yield Compared(model.name, Freshness.NO_SOURCE, have)
                continue
            key = model.source.SerializeToString(deterministic=True)
            if key not in asked:
                try:
                    asked[key] = self._newest(model.source)
                except ModelhostError as error:
                    asked[key] = error
            newest = asked[key]
            if isinstance(newest, ModelhostError):
                yield _freshness.compared(model, "", newest)
            else:
                yield _freshness.compared(model, newest)

    def _newest(self, source: models_pb2.Source) -> str:
        """Return a source's revision, also of one whose files came with ``allow_unsafe`` only."""
        ask = self._transport.models.InspectSource
        request = model_service_pb2.InspectSourceRequest(source=source)
        try:
            return (self._transport.unary(ask, request)).revision
        except ModelhostError as error:
            if error.reason != "UNSAFE_FILE":
                raise
        request.allow_unsafe = True
        return (self._transport.unary(ask, request)).revision

    def _upload(
        self, requests: Iterator[Request], timeout: float | None
    ) -> model_service_pb2.UploadModelFilesResponse:
        method = self._transport.models.UploadModelFiles
        return self._transport.upload(method, requests, "UploadModelFiles", timeout, lasting=True)

    def _questions(self, head: Request, sending: Sending) -> Iterator[Request]:
        """Yield the messages that ask what is there."""
        yield head
        for file in sending.files:
            yield sending.step(file)

    def _steps(self, head: Request, sending: Sending) -> Iterator[Request]:
        """Yield the messages of an upload; without the last one nothing is published."""
        yield head
        for file in sending.files:
            yield sending.step(file)
            sent_bytes = 0
            try:
                while data := self._transport.blocking(partial(sending.read, file, sent_bytes)):
                    yield Request(chunk=data)
                    sent_bytes += len(data)
                    sending.sent(len(data))
            except Exception as error:
                # A file, or the caller's progress: grpc would tell neither.
                sending.error = error
                return
        yield Request(commit=True)
