"""From the configuration to the sources: what is offered, what is refused, where tokens may go."""

from pathlib import Path

import pytest

from modelhostd.adapters.cancel import Canceller
from modelhostd.config_load import load
from modelhostd.config_values import ConfigError
from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.origins import Origin, parse_target
from modelhostd.core.source_uris import SCHEMES
from modelhostd.core.sources import parse_source
from modelhostd.source_setup import SERVICE_CREDENTIAL, SourceSetup

HUB = Origin("https", "huggingface.co", 443)
API = Origin("https", "api.github.com", 443)


def setup(environment: dict[str, str] | None = None, **variables: str) -> SourceSetup:
    """Return the sources of a configuration given as variables (``MODELHOST_DOWNLOADS_*``)."""
    given = {"HOME": "/home/ada", **(environment or {})}
    given |= {f"MODELHOST_DOWNLOADS_{name.upper()}": value for name, value in variables.items()}
    return SourceSetup(load(None, given).downloads, given)


def test_the_public_sources_are_offered_by_default() -> None:
    """Files of this machine are not, until somebody lists where they may be."""
    assert set(setup().offered) == {"hf", "https", "github", "ollama", "s3", "gs"}
    assert "file" in setup(file_roots="/srv/models").offered
    assert {f"{scheme}://" for scheme in setup().adapters} - {"http://"} == set(SCHEMES)


@pytest.mark.parametrize(
    ("uri", "scheme"),
    [
        ("hf://org/x", "hf"),
        ("https://example.com/x.gguf", "https"),
        ("http://example.com/x.gguf", "https"),
        ("github://o/r", "github"),
        ("ollama://x", "ollama"),
        ("file:///srv/x", "file"),
        ("s3://bucket/x", "s3"),
        ("gs://bucket/x", "gs"),
    ],
)
def test_a_kind_of_source_that_is_not_listed_is_refused(uri: str, scheme: str) -> None:
    """SOURCE_NOT_ALLOWED names the setting, before anything is looked up."""
    others = ",".join({"hf", "https", "github", "ollama", "file", "s3", "gs"} - {scheme})
    source = parse_source(uri)
    adapter = setup(sources=others).adapters[uri.partition(":")[0]]
    with pytest.raises(ModelhostError) as caught:
        adapter.connections(Canceller(), source)
    assert caught.value.reason is Reason.SOURCE_NOT_ALLOWED
    assert caught.value.metadata["setting"] == "downloads.sources"


def test_the_operators_hosts_are_what_the_policy_says() -> None:
    """Named hosts may be private or without TLS; each exception is for what it names alone."""
    adapter = setup(
        hosts="*.example.com", private_hosts="nas.lan", http_hosts="plain.example.com"
    ).adapters["https"]
    policy = adapter.connections(Canceller(), parse_source("https://a.example.com/x")).policy
    policy.check_target(parse_target("https://a.example.com/x", "x"), "x")
    policy.check_target(parse_target("https://nas.lan/x", "x"), "x")
    policy.check_address("nas.lan", "192.168.1.2", "x")
    policy.check_target(parse_target("http://plain.example.com/x", "x"), "x")
    for url in ("https://example.com/x", "https://evil.com/x", "http://nas.lan/x"):
        with pytest.raises(ModelhostError):
            policy.check_target(parse_target(url, "x"), "x")
    with pytest.raises(ModelhostError):
        policy.check_address("plain.example.com", "192.168.1.2", "x")


def test_an_endpoint_opens_its_own_kind_of_source_alone() -> None:
    """A Hub in the local network makes no private address reachable for URLs."""
    made = setup(endpoint="http://hub.lan:8080", mirrors="https://mirror.lan")
    hub = made.adapters["hf"].connections(Canceller(), parse_source("hf://o/x")).policy
    urls = made.adapters["https"].connections(Canceller(), parse_source("https://x/y")).policy
    for host in ("hub.lan", "mirror.lan"):
        hub.check_address(host, "10.0.0.1", "x")
        with pytest.raises(ModelhostError):
            urls.check_address(host, "10.0.0.1", "x")


def test_tokens_belong_to_their_endpoints(tmp_path: Path) -> None:
    """From variables, from a file of the operator's, from the service manager, in this order."""
    file, service = tmp_path / "credentials", tmp_path / SERVICE_CREDENTIAL
    file.write_text("https://huggingface.co from-file\nhttps://a.example from-file\n")
    file.chmod(0o600)
    service.write_text("https://a.example from-service\nhttps://b.example from-service\n")
    service.chmod(0o440)
    made = setup(
        {"HF_TOKEN": "hf_x", "GITHUB_TOKEN": "gh_x", "CREDENTIALS_DIRECTORY": str(tmp_path)},
        credentials=str(file),
    )
    wanted = {
        HUB: "hf_x",
        API: "gh_x",
        Origin("https", "a.example", 443): "from-file",
        Origin("https", "b.example", 443): "from-service",
        Origin("https", "a.example", 8443): None,
        Origin("http", "a.example", 80): None,
        Origin("https", "registry.ollama.ai", 443): None,
    }
    for origin, token in wanted.items():
        found = made.credentials.for_origin(origin)
        assert (found.token if found else None) == token, origin
    assert made.has_credential("hf")
    assert made.has_credential("github")
    assert made.has_credential("https")
    assert not made.has_credential("ollama")
    assert not made.has_credential("file")
    assert not setup({"HF_TOKEN": "hf_x"}).has_credential("https")
    assert "hf_x" not in repr(made.credentials.known()) + repr(vars(made.credentials))


def test_what_needs_an_extra_is_offered_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without its library a scheme is not among what the host shows; the others are."""
    monkeypatch.setattr("modelhostd.source_setup.find_spec", lambda name: None)
    assert set(setup().offered) == {"hf", "https", "github", "ollama"}


def test_keys_of_object_storage_come_from_their_usual_variables() -> None:
    """Access key with its secret for S3, an access token for Google; each for its own endpoint."""
    variables = {
        "AWS_ACCESS_KEY_ID": "AKIA",
        "AWS_SECRET_ACCESS_KEY": "s3_x",
        "AWS_SESSION_TOKEN": "s3_lent",
        "GOOGLE_OAUTH_ACCESS_TOKEN": "gs_x",
    }
    made = setup(variables, s3_endpoint="http://minio.lan:9000")
    s3 = made.credentials.for_origin(Origin("http", "minio.lan", 9000))
    gs = made.credentials.for_origin(Origin("https", "storage.googleapis.com", 443))
    assert s3 is not None
    assert gs is not None
    assert (s3.user, s3.token, gs.user, gs.token) == ("AKIA", "s3_x", "", "gs_x")
    assert made.has_credential("s3")
    assert made.has_credential("gs")
    assert not setup(variables).has_credential("hf")
    policy = made.adapters["s3"].connections(Canceller(), parse_source("s3://bucket/x")).policy
    policy.check_target(parse_target("http://minio.lan:9000/x", "x"), "x")
    policy.check_address("minio.lan", "10.0.0.1", "x")
    shown = repr(made.credentials.known()) + repr(vars(made.credentials))
    assert "s3_x" not in shown
    assert "gs_x" not in shown


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("endpoint", "huggingface.co"),
        ("endpoint", "ftp://host"),
        ("endpoint", "https://u:p@host"),
        ("endpoint", "https://host?x=1"),
        ("endpoint", "https://host:0"),
        ("endpoint", "https://[::1"),
        ("mirrors", "https://a,b"),
        ("hosts", "https://host"),
        ("hosts", "host/path"),
        ("private_hosts", "a b"),
        ("private_hosts", "*.lan"),
        ("http_hosts", "*"),
        ("sources", "hf,ftp"),
    ],
)
def test_a_wrong_value_stops_the_start(key: str, value: str) -> None:
    """With what was expected, instead of a policy that means something else."""
    with pytest.raises(ConfigError, match="expected"):
        setup(**{key: value})


def test_googles_credential_file_is_taken_where_no_token_is_given(tmp_path: Path) -> None:
    """By its usual variable or the configuration's key; who shows it shows where it is kept."""
    file = tmp_path / "key.json"
    file.write_text("{}")
    file.chmod(0o600)
    gs = Origin("https", "storage.googleapis.com", 443)
    made = setup({"GOOGLE_APPLICATION_CREDENTIALS": str(file)})
    with pytest.raises(ModelhostError, match="neither service_account nor authorized_user"):
        made.credentials.for_origin(gs)
    assert [(known.kept_in, known.state) for known in made.credentials.known()] == [
        (str(file), "UNUSABLE")
    ]
    token = {"GOOGLE_OAUTH_ACCESS_TOKEN": "gs_x"}
    found = setup(token, gs_credentials=str(file)).credentials.for_origin(gs)
    assert found is not None
    assert found.token == "gs_x"
