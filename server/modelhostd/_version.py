"""The version, for the distribution and for the daemon, which need not ask the installed packages for it."""

__version__ = "0.1.0.dev0"
