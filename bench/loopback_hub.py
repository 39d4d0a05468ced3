"""A Hugging Face Hub on 127.0.0.1: real repositories, the Hub's protocol, faults on request.

Two listeners, as in production: the hub (API, resolve) and a CDN on another port (bytes of LFS files),
so that a token bound to an origin can be seen not to reach the CDN. Standard library only.

As a program it serves folders until it is interrupted::

    python bench/loopback_hub.py --repo org/name=DIR --port 8080
    HF_ENDPOINT=http://127.0.0.1:8080 modelhost pull hf://org/name

As a library (tests, demo, benches)::

    with LoopbackHub({"org/name": Repo({"config.json": b"{}"})}) as hub:
        hub.fault(Fault("*/config.json", status=503))
        ...hub.endpoint...hub.requests...
"""

import argparse
import socket
import sys
import threading
from collections.abc import Mapping
from fnmatch import fnmatchcase
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

if not __package__:  # run as a script: only the folder of this file is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.loopback_hub_http import CdnHandler, Handler, HubHandler
from bench.loopback_repo import Fault, HubFile, LoggedRequest, Repo, git_oid

__all__ = ["Fault", "HubFile", "LoggedRequest", "LoopbackHub", "Repo", "git_oid"]


class LoopbackHub:
    """The two listeners and what they serve. ``start`` returns at once; ``stop`` ends every connection."""

    def __init__(
        self,
        repos: Mapping[str, Repo] | None = None,
        *,
        port: int = 0,
        tokens: tuple[str, ...] = (),
        page_size: int = 1000,
        rate: int = 0,
    ) -> None:
        self.repos: dict[str, Repo] = dict(repos or {})
        self.renames: dict[str, str] = {}
        """Old name -> new name; answered with a redirect, as the Hub does."""
        self.tokens = set(tokens)
        """Tokens that are valid at all; any other is refused with 401."""
        self.page_size = page_size
        self.rate = rate
        """Bytes per second and connection of every body; 0 = as fast as it goes."""
        self.signature = 1
        """What signed CDN URLs carry; raise it and all URLs handed out before are expired (403)."""
        self.cdn_base = ""
        """Where resolve redirects to; default: the own CDN listener."""
        self.next_link = ""
        """When set, every tree page names this as its next page: for hostile paging."""
        self.requests: list[LoggedRequest] = []
        self.stopping = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._servers = [self._server(HubHandler, port), self._server(CdnHandler, 0)]
        self._threads: list[threading.Thread] = []

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def cdn(self) -> str:
        """Where the bytes of LFS files come from."""
        return self.cdn_base or f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def start(self) -> Self:
        """Serve in threads; returns this hub, whose ``endpoint`` is now reachable."""
        for server in self._servers:
            thread = threading.Thread(
                target=server.serve_forever, args=(0.02,), name="loopback-hub", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        return self

    def stop(self) -> None:
        """Stop listening and close every connection, kept-alive and stalled ones too."""
        self.stopping.set()
        for server in self._servers:
            if self._threads:
                server.shutdown()
            server.server_close()
        with self._lock:
            open_sockets = list(self._sockets)
        for sock in open_sockets:
            close_hard(sock)
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.stop()

    def fault(self, fault: Fault) -> Fault:
        """Let something go wrong; returns the fault, whose ``reached`` can be waited for."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        """Let nothing go wrong from now on."""
        with self._lock:
            self._faults.clear()

    def take_fault(self, where: str, method: str, path: str) -> Fault | None:
        """Return the first fault for a request, and count it as used."""
        with self._lock:
            for fault in self._faults:
                if (
                    fault.used < fault.times
                    and fault.where in {"", where}
                    and fault.method in {"", method}
                    and fnmatchcase(path, fault.match)
                ):
                    fault.used += 1
                    return fault
        return None

    def log(self, request: LoggedRequest) -> None:
        """Remember one request."""
        with self._lock:
            self.requests.append(request)

    def track(self, sock: socket.socket, *, opened: bool) -> None:
        """Know which connections are open."""
        with self._lock:
            (self._sockets.add if opened else self._sockets.discard)(sock)

    def sent_bytes(self, where: str = "cdn") -> int:
        """Return how many body bytes one listener has sent in all."""
        with self._lock:
            return sum(request.sent for request in self.requests if request.where == where)

    def find_blob(self, sha256: str) -> HubFile | None:
        """Return a file of any commit by its digest."""
        for repo in list(self.repos.values()):
            for files in list(repo.commits.values()):
                for file in files.values():
                    if file.sha256 == sha256:
                        return file
        return None

    def _server(self, handler: type[Handler], port: int) -> ThreadingHTTPServer:
        bound: type[Handler] = type(handler.__name__, (handler,), {"hub": self})
        return _Server(("127.0.0.1", port), bound)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that went away: they are killed on purpose here."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def close_hard(sock: socket.socket) -> None:
    """Shut a connection down under its handler's feet; one that is gone already is fine."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def main() -> None:
    """Serve folders as repositories until interrupted."""
    parser = argparse.ArgumentParser(
        description="Serve folders over the Hugging Face Hub's protocol."
    )
    parser.add_argument("--repo", action="append", required=True, metavar="ORG/NAME=DIR")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: any free)")
    parser.add_argument("--task", default="", help="pipeline_tag (default: the card's)")
    parser.add_argument("--licence", default="", help="licence (default: the card's)")
    parser.add_argument("--rate", type=int, default=0, help="bytes per second and connection")
    args = parser.parse_args()
    repos = {}
    for spec in args.repo:
        name, _, folder = spec.partition("=")
        if not folder or not Path(folder).is_dir():
            parser.error(f"--repo {spec}: expected ORG/NAME=DIR with a folder that exists")
        repos[name] = Repo.from_folder(Path(folder), pipeline_tag=args.task, licence=args.licence)
    with LoopbackHub(repos, port=args.port, rate=args.rate) as hub:
        print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    main()
