"""`modelhost sources`: where models may come from, and for whom there are credentials."""

import json

from modelhost.v1 import host_pb2
from tests.client.double import Double

HOST = host_pb2.Host(
    sources=[
        {"scheme": "hf", "endpoint": "https://huggingface.co", "state": "REACHABLE"},
        {"scheme": "https", "state": "UNREACHABLE", "message": "no route"},
    ],
    credentials=[
        {"origin": "https://huggingface.co", "kept_in": "HF_TOKEN", "state": "REFUSED"},
        {"kept_in": "/etc/x", "state": "UNUSABLE", "message": "others may read it: chmod 600"},
    ],
)


def test_sources_and_credentials_are_listed(told: Double, run) -> None:
    """By kind of source and by origin; as JSON too."""
    told.on("GetHost", HOST)
    lines = run("sources").stdout.splitlines()
    assert "hf\tREACHABLE\thttps://huggingface.co\t" in lines
    assert "https://huggingface.co\tREFUSED\tHF_TOKEN\t" in lines
    assert any("chmod 600" in line for line in lines)
    shown = json.loads(run("sources", "--json").stdout)
    assert [one["scheme"] for one in shown["sources"]] == ["hf", "https"]
    assert shown["credentials"][0]["keptIn"] == "HF_TOKEN"


def test_status_warns_of_credentials_that_are_not_accepted(told: Double, run) -> None:
    """With where it is kept, so that one knows what to change."""
    told.on("GetHost", HOST)
    text = run("status").stdout
    assert "note: the credential in HF_TOKEN is not accepted" in text
    assert "note: the credential in /etc/x is not accepted: others may read it" in text


def test_without_credentials_there_is_no_second_table(told: Double, run) -> None:
    """Most have none."""
    told.on("GetHost", host_pb2.Host(sources=[{"scheme": "hf", "state": "UNKNOWN"}]))
    assert "CREDENTIAL" not in run("sources").stdout
