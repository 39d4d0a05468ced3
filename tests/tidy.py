"""The checks of ``test_tidy.py``: the style that no linter knows, each message with its remedy."""

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 100
# Where a reader is better served by one long file: path -> why. An entry no longer needed is an error.
LONG_FILES: dict[str, str] = {
    "tests/api/test_api_wrapper.py": "the rules of the one wrapper, read beside its docstring",
}
# Programs in processes of their own that hang or dawdle on purpose.
ACTORS = ("tests/worker/hostile_worker.py", "tests/worker/trouble_backend.py")
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?\Z")


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the root, its text and its tree."""

    path: str
    text: str
    tree: ast.Module

    def below(self, *folders: str) -> bool:
        """Tell whether the file is one of ``folders`` or inside one."""
        return any(PurePosixPath(self.path).is_relative_to(folder) for folder in folders)


def parsed(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text, path))


@functools.cache
def paths() -> tuple[str, ...]:
    """Return every file that is tracked, or would be: a new file is checked before it is added."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return tuple(sorted(p for p in listed.stdout.split("\0") if p and (ROOT / p).is_file()))


@functools.cache
def sources() -> tuple[Source, ...]:
    return tuple(
        parsed(path, (ROOT / path).read_text())
        for path in paths()
        if path.endswith(".py") and not GENERATED.search(path)
    )


def dotted(node: ast.AST) -> str:
    """Return ``a.b.c`` for a chain of attributes, "" for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Return local name -> what it is, so that ``from time import sleep as s`` is found as well."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update({a.asname: a.name for a in node.names if a.asname})
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    return names


# --- the checks: each yields "line: what is wrong; what to do" ------------------------------------


def long_files(source: Source) -> Iterator[str]:
    count = source.text.count("\n")
    if source.path in LONG_FILES:
        if count <= FILE_LINES_MAX:
            yield f"1: {count} lines are no longer too many; take it out of LONG_FILES"
    elif count > FILE_LINES_MAX:
        yield (
            f"{FILE_LINES_MAX}: {count} lines, at most {FILE_LINES_MAX} (300 wanted); give the part "
            "that has a name of its own a module of its own"
        )


def long_functions(source: Source) -> Iterator[str]:
    for node in functions(source.tree):
        docstring = ast.get_docstring(node, clean=False) or ""
        count = (node.end_lineno or node.lineno) - node.lineno - docstring.count("\n")
        if count > FUNCTION_LINES_MAX:
            yield (
                f"{node.lineno}: {node.name} has {count} lines, at most {FUNCTION_LINES_MAX} (70 wanted); "
                "keep the decision here and move the leaves out"
            )


@dataclass(frozen=True)
class Ban:
    """A call that is not made below ``where``, except below ``allowed``, and what to do instead."""

    call: str
    instead: str
    where: tuple[str, ...] = ("client", "server", "protos", "bench")
    allowed: tuple[str, ...] = ()


_UNPICKLE = "a pickle runs what it says; read safetensors, JSON or protobuf"
_CODE = "code of a model or a caller is never run"
_SHELL = "a shell splits what it is given; subprocess with a list"
BANS = (
    Ban(
        "time.sleep",
        "wait for an event, a condition or a descriptor, with a deadline",
        where=("server",),
        allowed=("server/modelhostd/adapters/failpoints.py",),
    ),
    *(Ban(f"{m}.{f}", _UNPICKLE) for m in ("pickle", "cPickle", "dill") for f in ("load", "loads")),
    Ban("pickle.Unpickler", _UNPICKLE),
    # Benches compare with it: with weights_only, on files they wrote themselves.
    Ban("torch.load", _UNPICKLE, where=("client", "server", "protos")),
    Ban("torch.jit.load", _UNPICKLE),
    Ban("numpy.load", "numpy.load may unpickle; read the header and the bytes", where=("server",)),
    Ban("eval", _CODE),
    Ban("exec", _CODE),
    Ban("os.system", _SHELL),
    Ban("os.popen", _SHELL),
    Ban("tempfile.mktemp", "another process can take the name first; mkstemp or a descriptor"),
    Ban("shutil.unpack_archive", "no archive is ever extracted"),
    Ban("tarfile.open", "no archive is ever extracted", where=("client", "server")),
    Ban("zipfile.ZipFile", "no archive is ever extracted", where=("client", "server")),
    Ban(
        "urllib.request.urlopen",
        "httpx2 with the policy for connections",
        where=("client", "server"),
    ),
    Ban("asyncio.get_event_loop", "asyncio.get_running_loop", where=("client", "server", "protos")),
    Ban("datetime.datetime.utcnow", "datetime.now(UTC): utcnow has no time zone"),
)
BANNED_KEYWORDS = {
    ("weights_only", False): _UNPICKLE,
    ("trust_remote_code", True): _CODE,
    ("allow_pickle", True): _UNPICKLE,
    ("shell", True): _SHELL,
}


def banned_calls(source: Source) -> Iterator[str]:
    names = imported_names(source.tree)
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        head, _, rest = dotted(node.func).partition(".")
        called = names.get(head, head) + (f".{rest}" if rest else "")
        for ban in BANS:
            if called == ban.call and source.below(*ban.where) and not source.below(*ban.allowed):
                yield f"{node.lineno}: {called} is not called here; instead: {ban.instead}"
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", None)
            why = (
                BANNED_KEYWORDS.get((keyword.arg or "", value)) if value in (True, False) else None
            )
            if why and source.below("client", "server"):
                yield f"{node.lineno}: {keyword.arg}={value} is not passed; {why}"


def silent_handlers(source: Source) -> Iterator[str]:
    """Find errors that are caught whole and dropped: a cancellation or a bug would go with them."""
    if not source.below("client", "server", "bench"):
        return
    wide = {"", "Exception", "BaseException"}
    remedy = "name the exceptions that are expected, or log what came"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            empty = all(
                isinstance(s, ast.Pass | ast.Continue)
                or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
                for s in node.body
            )
            if empty and any((dotted(c) if c else "") in wide for c in caught):
                yield f"{node.lineno}: every error is dropped in silence; {remedy}"
        elif isinstance(node, ast.Call) and dotted(node.func) in {
            "suppress",
            "contextlib.suppress",
        }:
            yield from (
                f"{node.lineno}: every error is suppressed; {remedy}"
                for argument in node.args
                if dotted(argument) in wide - {""}
            )


def prints(source: Source) -> Iterator[str]:
    """Find print in the daemon: its standard output is nobody's, and a full pipe blocks the loop."""
    commands = ("server/modelhostd/__main__.py", "server/modelhostd/fsck.py")
    if source.below("server") and not source.below(*commands):
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and dotted(node.func) == "print":
                yield f"{node.lineno}: print in the daemon; log it with structlog, or return it"


def torch_outside_worker(source: Source) -> Iterator[str]:
    if not source.below("client", "server", "protos") or source.below("server/modelhostd/worker"):
        return
    for node in ast.walk(source.tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        if any(m.split(".")[0] in {"torch", "transformers"} for m in modules):
            yield (
                f"{node.lineno}: torch is imported only below server/modelhostd/worker; a crash in it must "
                "not be the daemon's"
            )


def nameless_tests(source: Source) -> Iterator[str]:
    if not source.below("tests"):
        return
    for node in functions(source.tree):
        if node.name.startswith("test_") and not ast.get_docstring(node):
            yield f"{node.lineno}: {node.name} has no docstring; say the behaviour in one sentence"


def sleeping_tests(source: Source) -> Iterator[str]:
    if not source.below("tests") or source.below("tests/support.py", *ACTORS):
        return
    names = imported_names(source.tree)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            called = names.get(dotted(node.func), dotted(node.func))
            yields = [getattr(a, "value", None) for a in node.args] == [0]
            if called == "time.sleep" or (called == "asyncio.sleep" and not yields):
                yield (
                    f"{node.lineno}: {called} in a test is slow or flaky; wait for the event itself, or use "
                    "tests.support.wait_until (to hang on purpose: threading.Event().wait())"
                )


# What is generic at run time in the oldest grpcio allowed; elsewhere `grpc.X[...]` fails on import.
_GENERIC = {
    "ServicerContext",
    *(f"{a}{b}Call" for a in ("Unary", "Stream") for b in ("Unary", "Stream")),
    *(f"Unary{b}MultiCallable" for b in ("Unary", "Stream")),
}
GENERIC_IN_GRPC = frozenset(f"grpc.aio.{name}" for name in _GENERIC)


def subscripted_grpc(source: Source) -> Iterator[str]:
    if source.below("client", "server", "bench"):
        for node in ast.walk(source.tree):
            name = dotted(node.value) if isinstance(node, ast.Subscript) else ""
            if name.startswith("grpc.") and name not in GENERIC_IN_GRPC:
                yield f"{node.lineno}: {name}[...] fails on grpcio 1.74; quote the annotation"


CHECKS = (
    long_files,
    long_functions,
    banned_calls,
    silent_handlers,
    prints,
    torch_outside_worker,
    nameless_tests,
    sleeping_tests,
    subscripted_grpc,
)


# Put together here, so that this file does not hold what it looks for.
_REGISTRIES = "|".join(
    re.escape(".".join(p))
    for p in (("pypi", "org"), ("pythonhosted", "org"), ("registry", "npmjs"))
)
FORBIDDEN_WORDS = {
    re.compile(rf"{_REGISTRIES}|https?://[^ \"']*/simple/|index-url[ =]+https?:"): (
        "a package registry's address belongs to the machine's own configuration"
    ),
    re.compile(r"(?<![\w./-])/(work|root|farm|opt/(wheels|pypi))/"): (
        "a path of one machine; take a relative one, a temporary folder or a setting"
    ),
    re.compile(r"^(<{7}|>{7}) ", re.MULTILINE): "the marks of a merge conflict",
}


def forbidden_words(text: str) -> Iterator[str]:
    for pattern, why in FORBIDDEN_WORDS.items():
        for match in pattern.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            yield f"{line}: {match.group()!r}: {why}"
