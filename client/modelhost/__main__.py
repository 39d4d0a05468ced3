"""``python -m modelhost`` is the command ``modelhost``."""

from modelhost.cli import main

if __name__ == "__main__":
    main()
