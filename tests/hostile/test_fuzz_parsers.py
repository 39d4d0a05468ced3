"""Every parser of bytes from outside, and where any bytes are given to it; those of JSON are here.

``PARSERS`` is the list: a new parser gets a property test and a line there. Documents begin from good ones
and are changed as JSON, since bytes at random never come past the first brace.
"""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelhostd.adapters.codec import CodecError, decode_resource, encode_resource
from modelhostd.adapters.layout import PARTS, Home
from modelhostd.adapters.parts import kept_spans, read_journal
from modelhostd.core import resources
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.github_release import BadRelease, Release, parse_release
from modelhostd.core.http_replies import Asked, failure
from modelhostd.core.manifest import decode
from modelhostd.core.ollama_manifest import BadManifest, OtherLayers, parse_manifest, parse_token
from modelhostd.core.paths import path_fault
from modelhostd.core.resources import Kind, Source
from modelhostd.core.safetensors_header import parse_header
from modelhostd.core.transfer import RETRY_TOLD_CAP_S
from modelhostd.worker.backend import LoadError, UnsupportedModelError
from modelhostd.worker.backends.files import read_object, refuse_custom_code
from tests.core.test_manifest import MANIFEST, encode
from tests.hostile.json_values import encoded
from tests.hostile.messages import mutated

ROOT = Path(__file__).resolve().parents[2]

PARSERS: Mapping[str, str] = {
    # What callers send.
    "modelhostd.core.oip_scan.scan": "tests/core/test_oip_scan.py",
    "modelhostd.worker.oip.parse": "tests/worker/test_oip_parse.py",
    "modelhostd.api.messages.parsed": "tests/hostile/test_fuzz_control.py",
    "modelhostd.api.convert_from.request": "tests/hostile/test_fuzz_control.py",
    "modelhostd.host.registry_io.RegistryIo": "tests/hostile/test_fuzz_control.py",
    "modelhostd.core.pages.decode": "tests/core/test_pages.py",
    "modelhostd.core.names.parse": "tests/core/test_names.py",
    "modelhostd.core.registry.check_etag": "tests/hostile/test_fuzz_control.py",
    "modelhostd.core.sources.parse_source": "tests/core/test_sources.py",
    "modelhostd.core.event_filter.EventFilter": "tests/core/test_event_filter.py",
    "modelhostd.core.selection.select": "tests/core/test_selection.py",
    # What operators write.
    "modelhostd.config_load.parse": "tests/test_config_values.py",
    "modelhostd.core.credential_file.parse_credentials": "tests/core/test_credential_file.py",
    "modelhostd.core.google_login.parse_login": "tests/core/test_google_login.py",
    # What sources answer.
    "modelhostd.core.google_login.parse_token": "tests/core/test_google_login.py",
    "modelhostd.adapters.http_reader.HttpReader": "tests/hostile/test_fuzz_sources.py",
    "modelhostd.adapters.hub.Hub": "tests/hostile/test_fuzz_sources.py",
    "modelhostd.adapters.gs.GoogleStorage": "tests/hostile/test_fuzz_objects.py",
    "modelhostd.adapters.s3.S3": "tests/hostile/test_fuzz_objects.py",
    "modelhostd.core.object_facts.s3_digest": "tests/hostile/test_fuzz_objects.py",
    "modelhostd.core.object_facts.gs_digest": "tests/hostile/test_fuzz_objects.py",
    "modelhostd.core.origins.parse_target": "tests/core/test_origins.py",
    "modelhostd.core.paths.path_fault": "tests/core/test_paths.py",
    "modelhostd.core.url_files.parse_list": "tests/core/test_url_files.py",
    "modelhostd.core.url_files.name_of": "tests/core/test_url_files.py",
    "modelhostd.core.http_replies.failure": "tests/hostile/test_fuzz_parsers.py",
    "modelhostd.core.github_release.parse_release": "tests/hostile/test_fuzz_parsers.py",
    "modelhostd.core.ollama_manifest.parse_manifest": "tests/hostile/test_fuzz_parsers.py",
    "modelhostd.core.ollama_manifest.parse_token": "tests/hostile/test_fuzz_parsers.py",
    "modelhostd.core.ollama_manifest.parse_challenge": "tests/core/test_ollama_manifest.py",
    # What lies on the disk.
    "modelhostd.core.safetensors_header.parse_header": "tests/core/test_safetensors_header.py",
    "modelhostd.core.gguf_header.parse_gguf": "tests/core/test_gguf_header.py",
    "modelhostd.core.manifest.decode": "tests/core/test_manifest.py",
    "modelhostd.core.spans.parse_spans": "tests/core/test_spans.py",
    "modelhostd.adapters.parts.read_journal": "tests/hostile/test_fuzz_parsers.py",
    "modelhostd.adapters.codec.decode_resource": "tests/hostile/test_fuzz_parsers.py",
    "modelhostd.worker.backends.files.read_object": "tests/hostile/test_fuzz_parsers.py",
    # What a worker says.
    "modelhostd.worker.wire.frames.Decoder": "tests/worker/test_frames.py",
    "modelhostd.adapters.workers.control.Control": "tests/worker/test_worker_answers.py",
    "modelhostd.adapters.workers.errors.from_header": "tests/worker/test_worker_answers.py",
    "modelhostd.worker.wire.blackbox.BlackBox": "tests/worker/test_supervision.py",
    # What a daemon answers to a client.
    "modelhost._status.error_from_rpc": "tests/client/test_client_statuses.py",
}


@pytest.mark.parametrize("parser", PARSERS)
def test_each_parser_has_a_property_test(parser: str) -> None:
    """The parser is there, and its test gives it what hypothesis makes."""
    module, _, name = parser.rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    assert "@given" in (ROOT / PARSERS[parser]).read_text()


DIGEST = "ab" * 32
RELEASE = {
    "tag_name": "v1",
    "assets": [
        {"id": 1, "name": "a.gguf", "size": 5, "state": "uploaded", "digest": f"sha256:{DIGEST}"},
        {"id": 2, "name": "b.txt", "size": 0, "state": "uploaded", "digest": None},
    ],
}
LAYERS = {
    "schemaVersion": 2,
    "layers": [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{DIGEST}", "size": 5}
        for kind in ("model", "license", "license")
    ],
}  # fmt: skip
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
}
JOURNAL = {"format": 2, "size": 100, "boot": "b", "model": "m", "synced": "0-10 20-30"}
ROWS = {
    Kind.MODEL: resources.Model("m", "u", Source("hf://org/m"), 1.0, 2.0),
    Kind.SETTINGS: resources.Settings(),
}


def check_release(data: bytes) -> None:
    """Read a release."""
    found = parse_release(data)
    assert isinstance(found, Release)
    assert all(0 <= asset.size_bytes < 1 << 50 for asset in found.assets)
    assert found.revision


def check_layers(data: bytes) -> None:
    """Read the manifest of an Ollama model."""
    layers = parse_manifest(data, "m")
    assert len({layer.path for layer in layers}) == len(layers)
    assert not any(path_fault(layer.path) for layer in layers)


def check_token(data: bytes) -> None:
    """Read a token, which goes into a header."""
    assert "\r" not in parse_token(data)


def check_manifest(data: bytes) -> None:
    """Read the manifest of a tree; what was read can be written."""
    found = decode(data, "x/1")
    assert decode(encode(found), "x/1") == found


def check_header(data: bytes) -> None:
    """Read a safetensors header: its tensors cover their bytes."""
    found = parse_header(data, 8 + len(data) + 32, "x.safetensors")
    assert found.tensor_bytes in (0, 32)


def check_model_row(data: bytes) -> None:
    """Read a row; what was read can be written."""
    encode_resource(Kind.MODEL, decode_resource(Kind.MODEL, data))


def check_settings_row(data: bytes) -> None:
    """Read a row; what was read can be written."""
    encode_resource(Kind.SETTINGS, decode_resource(Kind.SETTINGS, data))


def _row(kind: Kind) -> Any:
    return json.loads(encode_resource(kind, ROWS[kind]))


CASES: list[tuple[Any, Callable[[bytes], None], tuple[type[Exception], ...]]] = [
    (RELEASE, check_release, (BadRelease,)),
    (LAYERS, check_layers, (BadManifest, OtherLayers)),
    ({"token": "abc"}, check_token, (BadManifest,)),
    (json.loads(encode(MANIFEST)), check_manifest, (ModelhostError,)),
    (HEADER, check_header, (ModelhostError,)),
    (_row(Kind.MODEL), check_model_row, (CodecError,)),
    (_row(Kind.SETTINGS), check_settings_row, (CodecError,)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1].__name__)
def test_any_document_is_read_or_refused(case: Any) -> None:
    """However a good document is changed: what is read is sound, all else the parser's own error."""
    document, check, errors = case
    check(json.dumps(document).encode())

    @given(encoded(document, mutated))
    def attempt(data: bytes) -> None:
        try:
            check(data)
        except errors as error:
            reason = getattr(error, "reason", None)
            assert reason is not Reason.INTERNAL

    attempt()


@settings(suppress_health_check=list(HealthCheck))
@given(
    encoded(JOURNAL, mutated), st.binary(max_size=40) | st.just(b"0-10 20-40"), st.integers(0, 200)
)
def test_any_journal_is_trusted_within_the_part_or_not_at_all(
    tmp_path_factory: pytest.TempPathFactory, head: bytes, tail: bytes, have: int
) -> None:
    """A torn or foreign journal never claims bytes that are not on disk."""
    home = _home(tmp_path_factory)
    parts = home.path.joinpath(*PARTS)
    (parts / "k.json").write_bytes(head + b"\n" + tail)
    (parts / "k.part").write_bytes(bytes(have))
    journal = read_journal(home, "k")
    assert journal is None or journal.size >= 0
    assert kept_spans(home, "k", 100).end <= min(have, 100)


_HOMES: list[Home] = []


def _home(factory: pytest.TempPathFactory) -> Home:
    if not _HOMES:
        _HOMES.append(Home(factory.mktemp("home")))
    return _HOMES[0]


_deep = st.builds(
    lambda depth, pair: (pair[0] * depth + "1" + pair[1] * depth).encode(),
    st.integers(900, 1100),
    st.sampled_from([('{"a":', "}"), ("[", "]")]),
)


@settings(suppress_health_check=list(HealthCheck))
@given(encoded({"architectures": ["x"], "n": 1, "sub": {"auto_map": {}}}, mutated) | _deep)
def test_any_configuration_of_a_model_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    """A model's own JSON: an object, or an error that names the file; custom code is found in any depth."""
    (tmp_path / "config.json").write_bytes(data)
    try:
        assert isinstance(read_object(tmp_path, "config.json"), dict)
        refuse_custom_code(tmp_path)
    except (LoadError, UnsupportedModelError) as error:
        assert "config.json" in str(error)  # noqa: PT017


_names = st.sampled_from(["retry-after", "ratelimit", "x-ratelimit-remaining", "x-ratelimit-reset"])
_values = st.one_of(
    st.text(max_size=30), st.sampled_from(["0", "9" * 11, "9" * 60, "-1", "\xb2", "1e9"])
)


@given(
    st.integers(100, 999) | st.sampled_from([401, 403, 404, 429, 503]),
    st.dictionaries(_names, _values),
    st.floats(0, 1e12),
)
def test_any_refusal_of_a_server_is_an_error_with_a_bounded_wait(
    status: int, headers: dict[str, str], now: float
) -> None:
    """Whatever the headers say, the wait is none or within what a Duration holds."""
    error, wait_s, _ = failure(Asked("https://a/b", "the file 'b'"), status, headers, now)
    assert error.reason is not Reason.INTERNAL
    for told in (wait_s, error.retry_delay_s):
        assert told is None or 0 <= told <= RETRY_TOLD_CAP_S
