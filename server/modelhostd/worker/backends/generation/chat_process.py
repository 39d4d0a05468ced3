"""Renders chat templates: a program of its own, since a template is a program that came with a model.

One request a line on standard input, as JSON ``{"template", "variables"}``; one answer a line on standard output, as
JSON ``{"text"}`` or ``{"error", "message"}``. It imports nothing of modelhost, reads no file, and has no more
memory and time than the limits below: a template that loops ends this process, and nothing else.
"""

import datetime as dt
import json
import resource
import signal
import sys
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 256 * 2**20
CPU_S = 0.5
"""CPU time for one rendering; a real template takes a few milliseconds."""
MAX_TEXT_CHARACTERS = 2**20
MAX_MESSAGE_CHARACTERS = 300


class RefusedError(Exception):
    """The template itself refused the messages, by ``raise_exception``."""


class GenerationBlock(Extension):
    """``{% generation %}``, by which templates mark what a model wrote: it changes no text."""

    tags = {"generation"}  # noqa: RUF012  (as the library declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return what is inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """The library's sandbox, which lets attributes of Python be empty; here reaching for one is an error."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuse an attribute."""
        raise SecurityError(f"access to attribute '{attribute}' of a {type(obj).__name__}")


def refuse(message: object) -> None:
    """Be ``raise_exception`` of templates."""
    raise RefusedError(str(message))


def to_json(value: Any, **options: Any) -> str:
    """Be the filter ``tojson`` of templates: unlike the library's it escapes nothing for HTML."""
    known = {"indent", "separators", "sort_keys", "ensure_ascii"}
    chosen = {"ensure_ascii": False, **{k: v for k, v in options.items() if k in known}}
    return json.dumps(value, **chosen)


def environment() -> ImmutableSandboxedEnvironment:
    """Return where templates run: no attributes of Python, nothing that can be changed."""
    made = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlock, "jinja2.ext.loopcontrols"],
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: dt.datetime.now().strftime(form)  # noqa: DTZ005
    return made


def render(env: ImmutableSandboxedEnvironment, template: str, variables: dict[str, Any]) -> str:
    """Return the text, or raise why there is none."""
    parts = []
    size = 0
    for part in env.from_string(template).generate(**variables):
        parts.append(part)
        size += len(part)
        if size > MAX_TEXT_CHARACTERS:
            raise RefusedError(f"the text has more than {MAX_TEXT_CHARACTERS} characters")
    return "".join(parts)


def answer(env: ImmutableSandboxedEnvironment, line: str) -> dict[str, str]:
    """Return what one request is answered."""
    request = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    try:
        return {"text": render(env, request["template"], request["variables"])}
    except RefusedError as error:
        kind, message = "refused", str(error)
    except SecurityError as error:
        kind, message = "forbidden", str(error)
    except MemoryError:
        kind, message = "memory", f"more than {MEMORY_BYTES} bytes"
    except RecursionError:
        kind, message = "depth", "too many levels"
    except jinja2.TemplateSyntaxError as error:
        kind, message = "syntax", f"line {error.lineno}: {error.message}"
    except Exception as error:
        kind, message = "failed", f"{type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"error": kind, "message": message[:MAX_MESSAGE_CHARACTERS]}


def main() -> None:
    """Answer until standard input ends, which it does when the worker does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Its default action, the end of this process, also reaches a loop inside a library.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    env = environment()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(env, line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
