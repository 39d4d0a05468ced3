"""Whether an image file can be mounted here."""

import os
import subprocess
from pathlib import Path


def why_not(root: Path) -> str:
    """Return why no image can be mounted below ``root``; empty when it can."""
    if os.geteuid() != 0:
        return "a loop mount needs root"
    image, mounted = root / "probe", root / "probed"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    for command in (
        ["mkfs.ext4", "-q", "-F", str(image)],
        ["mount", "-o", "loop", str(image), str(mounted)],
        ["umount", str(mounted)],
    ):
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
        except FileNotFoundError:
            return f"{command[0]} is not present"
        except subprocess.CalledProcessError as error:
            return f"no loop mounts here: {command[0]}: {error.stderr.strip()}"
    image.unlink()
    mounted.rmdir()
    return ""


def take_out(disk: Path) -> None:
    """Unmount what a program that was ended from outside may have left mounted."""
    subprocess.run(["umount", str(disk)], check=False, capture_output=True, timeout=30)
