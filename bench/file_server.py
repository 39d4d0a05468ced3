"""nginx on a port of loopback (Debian: ``apt install nginx-light``), as warm and as plain as it can be."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_S = 60.0
CONFIG = """
{user} worker_processes 1; daemon off; pid {root}/nginx.pid; error_log {root}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000; default_type application/octet-stream;
  client_body_temp_path {root}; proxy_temp_path {root}; fastcgi_temp_path {root};
  uwsgi_temp_path {root}; scgi_temp_path {root};
  server {{ listen 127.0.0.1:{port}; root {files}; }}
}}
"""


def installed() -> bool:
    """Tell whether there is an nginx."""
    return program() is not None


def program() -> str | None:
    """Return where nginx is; Debian has it where only root's PATH looks."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@contextmanager
def serving(root: Path, files: Path) -> Iterator[int]:
    """Serve a folder; yields the port of 127.0.0.1. ``root`` is made for what nginx writes.

    Raises RuntimeError where nginx is not installed, or does not start.
    """
    nginx = program()
    if nginx is None:
        raise RuntimeError("nginx is not installed (Debian: apt install nginx-light)")
    root.mkdir()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    # Its workers would be another user's, who may not read what only root may.
    user = "user root;" if os.geteuid() == 0 else ""
    config = root / "nginx.conf"
    config.write_text(CONFIG.format(root=root, files=files, port=port, user=user))
    with subprocess.Popen(
        [nginx, "-p", str(root), "-c", str(config)], stderr=subprocess.DEVNULL
    ) as process:
        try:
            _wait_for(port, process, root / "error.log")
            yield port
        finally:
            process.terminate()


def _wait_for(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"nginx does not serve: {log.read_text() if log.exists() else 'no log'}")
