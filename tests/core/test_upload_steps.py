"""The order of an upload: what may follow what, and what files may be called and weigh."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.uploads import Steps, UploadFile, UploadStart, check_files, check_start

SHA256 = "a" * 64


def test_files_then_commit_are_an_upload() -> None:
    """Whole files, one empty, one that is there but for its end, and the commit behind them."""
    steps = Steps(total_bytes=7)
    steps.file(UploadFile("config.json", 4))
    steps.chunk(1)
    steps.chunk(3)
    steps.file(UploadFile("empty.txt", 0))
    steps.file(UploadFile("nested/model.safetensors", 10, SHA256, offset=7))
    steps.chunk(3)
    steps.commit()
    assert steps.committed


@pytest.mark.parametrize(
    ("file", "field"),
    [
        (UploadFile("", 1), "file.path"),
        (UploadFile("../x", 1), "file.path"),
        (UploadFile("/etc/passwd", 1), "file.path"),
        (UploadFile("a//b", 1), "file.path"),
        (UploadFile("a\0b", 1), "file.path"),
        (UploadFile("a\u202eb.json", 1), "file.path"),
        (UploadFile("config.json", 1), "file.path"),
        (UploadFile("x.json", -1), "file.size_bytes"),
        (UploadFile("x.json", 1 << 62), "file.size_bytes"),
        (UploadFile("x.json", 1, "A" * 64), "file.sha256"),
        (UploadFile("x.json", 1, "abc"), "file.sha256"),
        (UploadFile("x.json", 1, SHA256, offset=2), "file.offset_bytes"),
        (UploadFile("x.json", 1, SHA256, offset=-1), "file.offset_bytes"),
        (UploadFile("x.json", 1, offset=1), "file.offset_bytes"),
    ],
)
def test_a_file_out_of_bounds_is_refused(file: UploadFile, field: str) -> None:
    """Each with the field that is wrong; a path that came before is one of them."""
    steps = Steps()
    steps.file(UploadFile("config.json", 0))
    with pytest.raises(ModelhostError) as caught:
        steps.file(file)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.metadata["field"] == field


@pytest.mark.parametrize("path", ["model.bin", "x.PT", "code.py", "Config.json", "config.json/x"])
def test_what_can_run_code_or_collides_is_refused(path: str) -> None:
    """Pickles, code, and names that are one file on some file systems: UNSAFE_FILE."""
    with pytest.raises(ModelhostError) as caught:
        check_files([UploadFile("config.json", 1), UploadFile(path, 1)])
    assert caught.value.reason is Reason.UNSAFE_FILE
    assert caught.value.metadata["source"] == "upload://"


@pytest.mark.parametrize(
    ("total", "taken", "expected"),
    [
        ("", ["chunk"], "chunk: expected bytes behind a step with a file"),
        ("", ["commit"], "at least one file"),
        ("", ["file", "commit"], "its size_bytes, got '0 bytes'"),
        ("", ["file", "file"], "its size_bytes, got '0 bytes'"),
        ("", ["file", "chunk", "chunk"], "5 bytes of 'a.json', its size_bytes, got 'more'"),
        (4, ["file", "chunk"], "4 bytes in all"),
        ("", ["file", "chunk", "commit", "commit"], "nothing behind commit"),
        ("", ["file", "chunk", "commit", "file"], "nothing behind commit"),
    ],
)
def test_steps_out_of_order_are_refused(total: int, taken: list[str], expected: str) -> None:
    """Too few bytes, too many, none at all, and something behind the end."""
    steps = Steps(total or 0)

    def take(step: str) -> None:
        if step == "file":
            steps.file(UploadFile("a.json", 5))
        elif step == "chunk":
            steps.chunk(5)
        else:
            steps.commit()

    for step in taken[:-1]:
        take(step)
    with pytest.raises(ModelhostError) as caught:
        take(taken[-1])
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert expected in caught.value.message


@given(st.lists(st.sampled_from(["file", "chunk", "commit"]), max_size=12))
def test_no_order_of_steps_ends_well_without_all_bytes(taken: list[str]) -> None:
    """What is accepted as a whole has a commit, at the end, and every byte of every file."""
    steps = Steps()
    came: list[int] = []
    try:
        for step in taken:
            if step == "file":
                steps.file(UploadFile(f"{len(came)}.json", 2))
                came.append(0)
            elif step == "chunk":
                steps.chunk(1)
                came[-1] += 1
            else:
                steps.commit()
    except ModelhostError:
        return
    if not steps.committed:
        return
    assert taken[-1] == "commit"
    assert came
    assert set(came) == {2}


@pytest.mark.parametrize(
    "start",
    [UploadStart(total_bytes=-1), UploadStart(revision="a\nb"), UploadStart(revision="a" * 201)],
)
def test_a_start_out_of_bounds_is_refused(start: UploadStart) -> None:
    """Its total or its revision."""
    with pytest.raises(ModelhostError) as caught:
        check_start(start)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
