"""``python -m modelhost.cli`` is the command ``modelhost``."""

from modelhost.cli.app import main

if __name__ == "__main__":
    main()
