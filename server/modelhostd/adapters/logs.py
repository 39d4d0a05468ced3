"""Logging: structlog over the standard library, so that every library's lines look the same.

Lines go to stderr: JSON where the journal reads it, readable text elsewhere. Context (``request_id``,
``model``, ``operation``) comes from context variables, which tasks inherit. The last step of every line
takes tokens out, whoever wrote them.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, TextIO

if "rich" not in sys.modules and "structlog" not in sys.modules:
    # structlog imports rich for tracebacks that are not used here: a tenth of the daemon's start.
    sys.modules["rich"] = None  # type: ignore[assignment]
    import structlog

    del sys.modules["rich"]
else:
    import structlog

_HIDDEN = "***"
_PATTERNS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{4,}"), f"hf_{_HIDDEN}"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{4,}"), rf"\1\2{_HIDDEN}"),
    (re.compile(r"(?<=://)[^/\s@\"'\\]+@"), f"{_HIDDEN}@"),
    # A presigned URL is a credential.
    (re.compile(r"(https?://[^\s\"'?\\]+)\?[^\s\"'\\]+"), rf"\1?{_HIDDEN}"),
)
_QUIET = ("asyncio", "grpc", "hpack", "httpcore2", "httpx2", "httpcore", "httpx", "huggingface_hub")
"""Loggers whose INFO is our DEBUG: one line for each request says nothing that ours do not."""

_GRPC = "grpc._cython.cygrpc"

# Levels of syslog.h, which the journal reads from the beginning of a line.
_JOURNAL_LEVELS = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_CONTROL = {number: f"\\x{number:02x}" for number in (*range(9), *range(11, 32), 127)}

_secrets: set[str] = set()


def configure(
    level: str = "info",
    format_: str = "auto",
    stream: TextIO | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Set up logging of the whole process; may be called again. ``format_``: auto, json or console."""
    stream = sys.stderr if stream is None else stream
    journal = is_journal(stream, environment)
    as_json = format_ == "json" or (format_ == "auto" and journal)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *_renderers(as_json, colours=not as_json and stream.isatty()),
                _Finish(journal=journal and as_json),
            ],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    logging.getLogger(_GRPC).addFilter(_is_news)
    set_level(level)


def set_level(level: str) -> None:
    """Change the level of everything, at once: debug, info, warning or error."""
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger().setLevel(number)
    for name in _QUIET:
        logging.getLogger(name).setLevel(number if number == logging.DEBUG else logging.WARNING)


def _is_news(record: logging.LogRecord) -> bool:
    """Tell whether a line of gRPC's says more than that a client left before its answer was read.

    It writes a traceback for each of those: any client could fill the log with them.
    """
    error = record.exc_info[1] if record.exc_info else None
    if type(error).__name__ != "ExecuteBatchError":
        return True
    return logging.getLogger(_GRPC).isEnabledFor(logging.DEBUG)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger of a module: ``log.info("what happened", model=..., bytes=...)``."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def context(**values: str) -> AbstractContextManager[None]:
    """Return a context in which every line carries ``values``, also those of tasks begun in it."""
    return structlog.contextvars.bound_contextvars(**values)


def hide(secret: str) -> None:
    """Take this text out of every line from now on (a token that no pattern would know)."""
    if len(secret) >= 4:
        _secrets.add(secret)
        _secrets.add(json.dumps(secret, ensure_ascii=False)[1:-1])
        _secrets.add(repr(secret)[1:-1])


def redact(text: str) -> str:
    """Return ``text`` without tokens, credentials of URLs and their queries."""
    for secret in _secrets:
        text = text.replace(secret, _HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Tell whether the journal reads this stream: ``$JOURNAL_STREAM`` is its device and inode."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _renderers(as_json: bool, colours: bool) -> list[Any]:
    if as_json:
        return [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
        ]
    # Its own tracebacks would show local variables, and so what is secret.
    plain = structlog.dev.plain_traceback
    return [
        _printable,
        structlog.dev.ConsoleRenderer(colors=colours, pad_event_to=0, exception_formatter=plain),
    ]


def _printable(
    _logger: Any, _name: str, event: MutableMapping[str, Any]
) -> MutableMapping[str, Any]:
    """Escape what would move a terminal's cursor; names come from clients and sources."""
    for key, value in event.items():
        if isinstance(value, str) and key not in ("exception", "stack"):
            event[key] = value.translate(_CONTROL).replace("\n", "\\n")
    return event


class _Finish:
    """The last step: no secrets, and the journal's level in front."""

    def __init__(self, *, journal: bool) -> None:
        self._journal = journal

    def __call__(self, _logger: Any, name: str, line: Any) -> str:
        text = redact(line)
        return f"<{_JOURNAL_LEVELS.get(name, 6)}>{text}" if self._journal else text
