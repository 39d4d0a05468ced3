"""Rates, time left, retries, tasks and first bytes: small pure decisions of a download."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core.errors import ModelhostError, Reason
from modelhostd.core.formats import check_content, unsafe_content
from modelhostd.core.hub_replies import BAD_TOKEN, DISABLED, Asked, refusal, transient_error
from modelhostd.core.tasks import ALIASES, OTHER, TASKS, task_of, task_of_config
from modelhostd.core.transfer import RateMeter, RetryPolicy, retry_after_seconds

NOW = 1_700_000_000.0


def test_the_rate_is_of_the_last_seconds() -> None:
    """A stall shows at once, and an old burst is forgotten."""
    meter = RateMeter(window_s=4.0)
    assert meter.sample(0.0, 0) == 0.0
    assert meter.sample(1.0, 100) == pytest.approx(100.0)
    for second in range(2, 12):
        rate = meter.sample(float(second), 100)
    assert rate == 0.0
    assert RateMeter.eta_s(0.0, 5) is None
    assert RateMeter.eta_s(0.0, 0) == 0.0
    assert RateMeter.eta_s(10.0, 50) == pytest.approx(5.0)


@given(st.lists(st.tuples(st.floats(0.01, 5), st.integers(0, 10**9)), max_size=50))
def test_a_rate_is_never_negative_nor_above_what_came(steps: list[tuple[float, int]]) -> None:
    """Between zero and the fastest step."""
    meter, now, done = RateMeter(), 0.0, 0
    meter.sample(now, done)
    fastest = 0.0
    for seconds, count in steps:
        now, done = now + seconds, done + count
        fastest = max(fastest, count / seconds)
        assert 0 <= meter.sample(now, done) <= fastest * 1.001 + 1


def test_retries_back_off_with_jitter_and_end() -> None:
    """The ceiling doubles up to its cap; the last failure gives up."""
    policy = RetryPolicy(tries=5, base_s=1.0, cap_s=3.0)
    assert [policy.delay(n, None, 0.5) for n in range(1, 6)] == [0.5, 1.0, 1.5, 1.5, None]


def test_a_server_that_says_when_is_obeyed_within_reason() -> None:
    """A year is not waited for: the caller is told instead."""
    policy = RetryPolicy(retry_after_cap_s=300)
    assert policy.delay(1, 7.0, 0.9) == 7.0
    assert policy.delay(1, 0.0, 0.9) == 0.0
    assert policy.delay(1, 31_536_000.0, 0.9) is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("0", 0.0),
        ("120", 120.0),
        (" 5 ", 5.0),
        ("Tue, 14 Nov 2023 22:13:30 GMT", 10.0),
        ("Tue, 14 Nov 2000 22:13:30 GMT", 0.0),
        ("-1", None),
        ("1.5", None),
        ("soon", None),
        ("\u0661", None),
        ("9" * 100, None),
        ("Tue, 99 Nov 2023 99:13:30 GMT", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(value: str | None, expected: float | None) -> None:
    """Garbage is no answer."""
    assert retry_after_seconds(value, NOW) == expected


@pytest.mark.parametrize(
    ("status", "code", "message", "reason"),
    [
        (401, "GatedRepo", "", Reason.GATED),
        (403, "GatedRepo", "", Reason.GATED),
        (401, "RepoNotFound", "", Reason.SOURCE_NOT_FOUND),
        (404, "RepoNotFound", "", Reason.SOURCE_NOT_FOUND),
        (404, "RevisionNotFound", "", Reason.SOURCE_NOT_FOUND),
        (404, "EntryNotFound", "", Reason.SOURCE_NOT_FOUND),
        (404, "", "", Reason.SOURCE_NOT_FOUND),
        (401, "", BAD_TOKEN, Reason.AUTHENTICATION_REQUIRED),
        (401, "", "", Reason.AUTHENTICATION_REQUIRED),
        (403, "", DISABLED, Reason.ACCESS_DENIED),
        (403, "", "", Reason.ACCESS_DENIED),
        (400, "", "", Reason.BAD_SOURCE_REPLY),
        (418, "x", "y", Reason.BAD_SOURCE_REPLY),
    ],
)
def test_each_refusal_of_the_hub_has_its_reason(
    status: int, code: str, message: str, reason: Reason
) -> None:
    """And a message that names the source."""
    asked = Asked("hf://org/x", "https://huggingface.co/org/x", "main", "a.json")
    error = refusal(asked, status, code, message)
    assert error.reason is reason
    assert "hf://org/x" in error.message


def test_a_missing_repository_hints_at_the_token_only_without_one() -> None:
    """The Hub says 401 for missing and private alike."""
    without = refusal(Asked("hf://o/x", "p"), 401, "RepoNotFound", "")
    having = refusal(Asked("hf://o/x", "p", has_token=True), 404, "RepoNotFound", "")
    assert "HF_TOKEN" in without.message
    assert "HF_TOKEN" not in having.message
    assert without.metadata["missing"] == "repository"


def test_rate_limits_carry_the_seconds_of_either_header() -> None:
    """Retry-After first, else the Hub's RateLimit; 5xx are network errors with their status."""
    asked = Asked("hf://o/x", "p")
    error, wait_s = transient_error(asked, 429, None, '"api";r=0;t=55', NOW)
    assert (error.reason, wait_s, error.retry_delay_s) == (Reason.RATE_LIMITED, 55.0, 55.0)
    assert error.metadata["retryAfterSeconds"] == "55"
    assert transient_error(asked, 429, "7", '"api";r=0;t=55', NOW)[1] == 7.0
    assert transient_error(asked, 429, None, "garbage", NOW)[1] is None
    error, _ = transient_error(asked, 503, None, None, NOW)
    assert (error.reason, error.metadata["status"]) == (Reason.NETWORK_ERROR, "503")


@pytest.mark.parametrize(
    ("tag", "tags", "task"),
    [
        ("sentence-similarity", (), "feature-extraction"),
        ("text-classification", (), "text-classification"),
        ("Sentence_Similarity", (), "feature-extraction"),
        ("", ("pytorch", "sentence-transformers"), "feature-extraction"),
        ("", ("bert",), OTHER),
        ("reinforcement-learning", ("text-generation",), OTHER),
        ("", (), OTHER),
        ("\x00", ("\ud800",), OTHER),
    ],
)
def test_the_hubs_words_become_tasks(tag: str, tags: tuple[str, ...], task: str) -> None:
    """Unknown words are other, never an error; a pipeline_tag outweighs the tags."""
    assert task_of(tag, tags) == task


@pytest.mark.parametrize(
    ("classes", "task"),
    [
        (["LlamaForCausalLM"], "text-generation"),
        (["GPT2LMHeadModel"], "text-generation"),
        (["BertForSequenceClassification"], "text-classification"),
        (["BertModel"], "feature-extraction"),
        (["T5ForConditionalGeneration"], ""),
        ([], ""),
        ([7], ""),
        ("BertModel", ""),
        (None, ""),
    ],
)
def test_what_a_model_was_saved_from_tells_its_task(classes: object, task: str) -> None:
    """For models of texts; what says nothing, or is malformed, is nothing."""
    assert task_of_config({"architectures": classes, "vocab_size": 9}) == task
    assert task_of_config({"architectures": classes}) == ""


def test_every_alias_leads_to_a_task() -> None:
    """And no task is an alias of another."""
    assert set(ALIASES.values()) <= TASKS
    assert not set(ALIASES) & TASKS


@pytest.mark.parametrize(
    ("head", "refused"),
    [
        (b"\x80\x04\x95", True),
        (b"\x80\x02}", True),
        (b"PK\x03\x04rest", True),
        (b"PK\x05\x06", True),
        (b"\x00" * 257 + b"ustar\x00", True),
        (b"\x7fELF", True),
        (b"MZ\x90", True),
        (b"GGUF\x03", False),
        (b'{"a": 1}', False),
        (b"\x80\x81", False),
        (b"", False),
        (b"plain text", False),
    ],
)
def test_content_tells_pickles_whatever_the_name(head: bytes, refused: bool) -> None:
    """UNSAFE_FILE names the file and what it is."""
    assert bool(unsafe_content(head)) is refused
    if refused:
        with pytest.raises(ModelhostError) as caught:
            check_content("tokenizer.json", head, "hf://org/x")
        assert caught.value.reason is Reason.UNSAFE_FILE
