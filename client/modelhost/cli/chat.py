"""Text generation on the command line: one prompt, or a conversation on a terminal."""

import contextlib
import queue
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelhost._errors import InvalidArgument, ModelhostError
from modelhost.cli import failures
from modelhost.cli.output import Output, error_note

if TYPE_CHECKING:
    from modelhost import Client, Generation, TextStream

PROMPT = ">>> "
STOP_S = 5.0
"""How long a text that was cancelled may take to end."""
HELP = "Ctrl-C ends an answer, /clear forgets the conversation, /bye ends."


class Talk:
    """A conversation with a model; ``said`` is what both sides have said so far.

    ``raw``: the model goes on from each text by itself. So it does where it turns out to have no chat template.
    """

    def __init__(
        self,
        client: "Client",
        model: str,
        sampling: Mapping[str, Any],
        *,
        system: str | None = None,
        raw: bool = False,
    ) -> None:
        self._client = client
        self._model = model
        self._sampling = sampling
        self._system = system
        self.raw = raw
        self.said: list[dict[str, str]] = []
        self.clear()

    def clear(self) -> None:
        """Forget what was said, but for what the model is told first."""
        self.said = [{"role": "system", "content": self._system}] if self._system else []

    def ask(self, text: str, *, show: bool) -> "Generation":
        """Return the answer to a text, shown as it comes; Ctrl-C ends the work and is raised again.

        What was answered until then is part of the conversation; a text that fails is not.
        """
        if not self.raw:
            try:
                return self._ask(text, [*self.said, {"role": "user", "content": text}], show=show)
            except InvalidArgument as error:
                # One that has a template, which refuses these messages, says so in other words.
                if "no chat template" not in error.message:
                    raise
            self.raw = True
            note = "the model has no chat template: it goes on from each text by itself"
            error_note([f"modelhost: {note}" + (", without --system" if self._system else "")])
        return self._ask(text, text, show=show)

    def _ask(self, text: str, prompt: Any, *, show: bool) -> "Generation":
        pieces = self._client.generate(self._model, prompt, stream=True, **self._sampling)
        arrived: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
        # Ctrl-C strikes this thread at any place; in the midst of grpc it could leave a lock held.
        reader = threading.Thread(target=_read, args=(pieces, arrived), daemon=True)
        reader.start()
        try:
            while (piece := arrived.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                if show:
                    _show(piece)
        except KeyboardInterrupt:
            _stop(pieces, reader)
            self._keep(text, pieces)
            raise
        except BaseException:
            _stop(pieces, reader)
            raise
        self._keep(text, pieces)
        return pieces.result

    def _keep(self, text: str, pieces: "TextStream") -> None:
        answer = pieces.result.text
        self.said += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def _read(pieces: "TextStream", arrived: "queue.SimpleQueue[str | Exception | None]") -> None:
    """Hand on each piece; in the end None, or what it failed with."""
    try:
        for piece in pieces:
            arrived.put(piece)
    except Exception as error:
        arrived.put(error)
    else:
        arrived.put(None)


def _stop(pieces: "TextStream", reader: threading.Thread) -> None:
    pieces.close()
    reader.join(STOP_S)


def once(talk: Talk, text: str, output: Output) -> None:
    """Show the answer to one prompt."""
    made = talk.ask(text, show=not output.json)
    if output.json:
        output.document(
            {
                "text": made.text,
                "finishReason": made.finish_reason,
                "inputTokens": made.input_tokens,
                "outputTokens": made.output_tokens,
            }
        )
    else:
        _show("\n")


def interactive(talk: Talk) -> None:
    """Talk until /bye or the end of the input. Errors are shown, and the chat goes on."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines and knows those before)
    error_note([HELP])
    while True:
        try:
            text = input(PROMPT).strip()
        except KeyboardInterrupt:
            error_note(["", HELP])
            continue
        except EOFError:
            _show("\n")
            return
        if text == "/bye":
            return
        if text == "/clear":
            talk.clear()
        elif text.startswith("/"):
            error_note([f"{text.split()[0]} is no command. {HELP}"])
        elif text:
            _answer(talk, text)


def _answer(talk: Talk, text: str) -> None:
    try:
        made = talk.ask(text, show=True)
    except KeyboardInterrupt:
        error_note(["", "(stopped)"])
        return
    except ModelhostError as error:
        _show("\n")
        failures.report(error, Output("auto"))
        return
    _show("\n")
    if made.finish_reason == "length":
        error_note(["(cut: max_tokens, or the model's context, is reached)"])


def _show(text: str) -> None:
    """Write a piece of a text; on a terminal without what that would act on."""
    if sys.stdout.isatty():
        from modelhost._text import plain

        text = "".join(c if c in "\n\t" else plain(c) for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()
