"""The command ``modelhost``. Modules of this package import grpc, rich and numpy inside commands only."""

from modelhost.cli.app import main

__all__ = ["main"]
