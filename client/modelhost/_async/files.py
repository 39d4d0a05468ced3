"""Files of models: brought from this machine, and compared with what their sources have."""
# ruff: noqa: ASYNC109 - a timeout is sent with the call, so that the daemon keeps it, too

import os
from collections.abc import AsyncIterator, Iterable
from functools import partial

from modelhost import _calls, _freshness, _names, _upload
from modelhost._async.registry import AsyncRegistry
from modelhost._errors import ModelhostError, NotFound
from modelhost._freshness import Compared, Freshness
from modelhost._progress import Report, reporter
from modelhost._upload import Sending
from modelhost.v1 import model_service_pb2, models_pb2

Request = model_service_pb2.UploadModelFilesRequest


class AsyncFiles(AsyncRegistry):
    """What ``AsyncClient`` does with files of this machine, and with the age of those of the host."""

    async def upload(
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
        files = await self._transport.blocking(partial(_upload.gather, paths, include, exclude))
        name = _names.model_name(model)
        with reporter(progress) as report:
            sending = Sending(name, files, report)
            await self._transport.blocking(sending.hash)
            try:
                known = await self.get(model)
            except NotFound:
                await self.add(None, _names.model_id(name), task=task)
            else:
                if task and task != known.task:
                    await self.update(known.name, {"task": task})
            question = Request(model=name, start=Request.Start(dry_run=True))
            answer = await self._upload(self._questions(question, sending), timeout)
            start = Request.Start(
                revision=revision,
                total_bytes=sending.answered(answer),
                request_id=_calls.make_request_id(),
            )
            try:
                done = await self._upload(
                    self._steps(Request(model=name, start=start), sending), timeout
                )
            except ModelhostError:
                if sending.error is None:
                    raise
            if sending.error is not None:
                raise sending.error
            return done

    async def outdated(self, models: Iterable[str] = ()) -> AsyncIterator[Compared]:
        """Compare models (by default all) with what their sources have; yield each as it is known.

        Sources are asked one after another, each once, for at most the client's timeout. One that
        cannot be asked stops nothing: ``Compared.error`` says why. Raises NotFound for a model that is
        not there.
        """
        names = list(models)
        found = [await self.get(name) for name in names] if names else await self.models()
        asked: dict[bytes, str | ModelhostError] = {}
        for model in found:
            if not model.source.uri:
                have = _freshness.on_disk(model)
                yield Compared(model.name, Freshness.NO_SOURCE, have)
                continue
            key = model.source.SerializeToString(deterministic=True)
            if key not in asked:
                try:
                    asked[key] = await self._newest(model.source)
                except ModelhostError as error:
                    asked[key] = error
            newest = asked[key]
            if isinstance(newest, ModelhostError):
                yield _freshness.compared(model, "", newest)
            else:
                yield _freshness.compared(model, newest)

    async def _newest(self, source: models_pb2.Source) -> str:
        """Return a source's revision, also of one whose files came with ``allow_unsafe`` only."""
        ask = self._transport.models.InspectSource
        request = model_service_pb2.InspectSourceRequest(source=source)
        try:
            return (await self._transport.unary(ask, request)).revision
        except ModelhostError as error:
            if error.reason != "UNSAFE_FILE":
                raise
        request.allow_unsafe = True
        return (await self._transport.unary(ask, request)).revision

    async def _upload(
        self, requests: AsyncIterator[Request], timeout: float | None
    ) -> model_service_pb2.UploadModelFilesResponse:
        method = self._transport.models.UploadModelFiles
        return await self._transport.upload(
            method, requests, "UploadModelFiles", timeout, lasting=True
        )

    async def _questions(self, head: Request, sending: Sending) -> AsyncIterator[Request]:
        """Yield the messages that ask what is there."""
        yield head
        for file in sending.files:
            yield sending.step(file)

    async def _steps(self, head: Request, sending: Sending) -> AsyncIterator[Request]:
        """Yield the messages of an upload; without the last one nothing is published."""
        yield head
        for file in sending.files:
            yield sending.step(file)
            sent_bytes = 0
            try:
                while data := await self._transport.blocking(
                    partial(sending.read, file, sent_bytes)
                ):
                    yield Request(chunk=data)
                    sent_bytes += len(data)
                    sending.sent(len(data))
            except Exception as error:
                # A file, or the caller's progress: grpc would tell neither.
                sending.error = error
                return
        yield Request(commit=True)
