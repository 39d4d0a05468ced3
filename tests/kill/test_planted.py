"""The harness finds bugs that are planted, each in seconds, and none where there is none."""

import os
import re
from pathlib import Path

import pytest

from bench.loopback_hub import LoopbackHub
from tests.kill import programs
from tests.kill.planting import BUGS, PATCHES, Bug, StalePatch, copied, plant

SEED = int(os.environ.get("MODELHOST_TEST_SEED", "1"))
CLEAN = {
    "kill_loop.py": 60,
    "download_loop.py": 60,
    "durable.py": 20,
    "power_cut.py": 20,
    "daemon_loop.py": 3,
}
TIMEOUT_S = 900.0


@pytest.mark.timeout(1050)
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.patch)
def test_a_planted_bug_is_found(
    bug: Bug, root: Path, hub: LoopbackHub, request: pytest.FixtureRequest
) -> None:
    """The harness reports the bug in the words of the promise that it breaks."""
    place = _place(bug.program, root, request)
    with copied() as source:
        plant(source, bug.patch)
        with pytest.raises(programs.ProgramFailed) as found:
            programs.run(
                bug.program,
                place,
                hub.endpoint,
                bug.rounds,
                SEED,
                timeout_s=TIMEOUT_S,
                source=source,
            )
    assert re.search(bug.says, str(found.value)), found.value


@pytest.mark.slow  # the suite runs the same programs at length where they are
@pytest.mark.timeout(1050)
@pytest.mark.parametrize("program", CLEAN)
def test_a_copy_without_a_bug_passes(
    program: str, root: Path, hub: LoopbackHub, request: pytest.FixtureRequest
) -> None:
    """What finds the bugs finds nothing in the same copy without them."""
    place = _place(program, root, request)
    with copied() as source:
        programs.run(
            program, place, hub.endpoint, CLEAN[program], SEED, timeout_s=TIMEOUT_S, source=source
        )


def test_a_patch_that_does_not_fit_is_refused() -> None:
    """A patch whose bug has no place any more fails loudly, and changes nothing."""
    with copied() as source:
        plant(source, BUGS[0].patch)
        with pytest.raises(StalePatch):
            plant(source, BUGS[0].patch)


def test_each_patch_is_tried() -> None:
    """No patch lies about that nothing applies."""
    assert {path.stem for path in PATCHES.glob("*.patch")} == {bug.patch for bug in BUGS}


def _place(program: str, root: Path, request: pytest.FixtureRequest) -> Path:
    """Return where a program may work: for a power cut a disk of its own, or no test."""
    if program != "power_cut.py":
        return root / "it"
    disk: Path = request.getfixturevalue("disk")
    return disk
