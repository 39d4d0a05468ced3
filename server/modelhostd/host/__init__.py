"""The host: owns the state. A command is decided by core, committed, published; then its effects run.

``Host`` is what api and gateway call; the modules beside it are its parts.
"""

from modelhostd.host.host import Host, HostConfig

__all__ = ["Host", "HostConfig"]
