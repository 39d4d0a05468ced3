"""export and import: the registry as a file."""

import json
from pathlib import Path

from modelhost.v1 import host_service_pb2
from tests.client.double import Double


def test_export_and_import_are_files(double: Double, run, tmp_path: Path) -> None:
    """The document goes to a file or to stdout byte by byte, and comes from one."""
    double.on(
        "ExportRegistry", [host_service_pb2.ExportRegistryResponse(chunk=b'{"x": "\xc3\xa9"}')]
    )
    double.on(
        "ImportRegistry",
        host_service_pb2.ImportRegistryResponse(
            created_models=["models/a"], skipped_models=["models/b"]
        ),
    )
    path = tmp_path / "registry.json"
    assert run("export", str(path)).output == ""
    assert path.read_bytes() == b'{"x": "\xc3\xa9"}' == run("export").stdout_bytes
    done = run("import", str(path), "--conflict", "skip", "--settings", "--dry-run")
    assert done.stdout == (
        "models/a\twould be created\nmodels/b\tleft as it is\n1 model would be imported\n"
    )
    ((message,),) = double.requests("ImportRegistry")
    assert (message.chunk, message.include_settings, message.dry_run) == (
        path.read_bytes(),
        True,
        True,
    )
    assert json.loads(run("import", "-", "--json", input="{}").stdout)["createdModels"] == [
        "models/a"
    ]


def test_a_file_that_cannot_be_written_is_1(double: Double, run, tmp_path: Path) -> None:
    """A failure of this machine's disk names the file."""
    double.on("ExportRegistry", [host_service_pb2.ExportRegistryResponse(chunk=b"{}")])
    done = run("export", str(tmp_path / "none" / "x.json"))
    assert done.exit_code == 1
    assert "none/x.json" in done.stderr
