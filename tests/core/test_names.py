"""Resource names: what is an id, how names are taken apart, and what is refused."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelhostd.core import names
from modelhostd.core.errors import REASONS, Code, ModelhostError, Reason
from tests.core.attempt import attempt

EDGE = string.ascii_lowercase + string.digits
IDS = st.from_regex(names.ID, fullmatch=True)
COLLECTIONS = ["models", "operations", "devices", "slots", "leases"]


@pytest.mark.parametrize(
    "value", ["a", "0", "minilm-l6-v2", "a.b_c-d", "a..b", "x" * 64, "2024.1", "a" + "-" * 62 + "b"]
)
def test_ids(value: str) -> None:
    """An id is 1 to 64 of a-z, 0-9, dot, underscore and hyphen, with letters or digits at its ends."""
    assert names.check_id("name", value) == value


PATHS = ["", ".", "..", "../x", "a/b", "a\\b", "%2e%2e", "a?b", "CON:"]
SHAPES = ["A", "a ", " a", "a\n", "-a", "a-", "_a", "a_", "x" * 65, "x" * 300]
LOOK_ALIKES = ["a\x00", "\u00e9", "\u0430", "\uff41", "a\u200b", "\u0663", "a\ud800"]


@pytest.mark.parametrize("value", [*PATHS, *SHAPES, *LOOK_ALIKES], ids=ascii)
def test_not_ids(value: str) -> None:
    """Paths, spaces, capitals, control characters and look-alikes of other scripts are no ids."""
    with pytest.raises(ModelhostError) as caught:
        names.check_id("model_id", value)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.metadata["field"] == "model_id"


@given(st.text(max_size=70))
def test_an_id_is_what_the_rule_says(value: str) -> None:
    """The check agrees with the rule said in another way, for any text."""
    allowed = set(EDGE + "._-")
    expected = (
        0 < len(value) <= 64
        and set(value) <= allowed
        and value[0] in set(EDGE)
        and value[-1] in set(EDGE)
    )
    assert (names.ID.fullmatch(value) is not None) == expected


@given(IDS, st.sampled_from(COLLECTIONS))
def test_a_name_comes_apart_as_it_was_put_together(key: str, collection: str) -> None:
    """The id in a name is found again, and only under its own collection."""
    assert names.parse(collection, "name", f"{collection}/{key}") == key
    for other in COLLECTIONS:
        if other != collection:
            with pytest.raises(ModelhostError):
                names.parse(other, "name", f"{collection}/{key}")


@given(IDS, IDS)
def test_instance_names(model: str, instance: str) -> None:
    """An instance's name has its model's id and its own."""
    name = f"models/{model}/instances/{instance}"
    assert names.parse_instance("name", name) == (model, instance)
    with pytest.raises(ModelhostError):
        names.parse("models", "name", name)


MODEL_NAMES = ["", "a", "models", "models/", "models//a", "/models/a", "models/a/", "models/../a"]
INSTANCE_NAMES = ["models/a/instances", "models/a/instances/", "models/a/instance/1"]
OTHER_NAMES = ["Models/a", "models/a/instances/1/x", "models/A/instances/1", "models/a/instances/-"]


@pytest.mark.parametrize("name", [*MODEL_NAMES, *INSTANCE_NAMES, *OTHER_NAMES, "models/\n"])
def test_broken_names(name: str) -> None:
    """A name that is not exactly of its form is refused, naming the field it came in."""
    for parse in (
        lambda: names.parse("models", "model", name),
        lambda: names.parse_instance("model", name),
    ):
        with pytest.raises(ModelhostError) as caught:
            parse()
        assert caught.value.metadata["field"] == "model"


@given(st.text(max_size=100))
def test_any_text_is_taken_apart_or_refused(name: str) -> None:
    """No text makes the parsers fail in another way than INVALID_ARGUMENT."""
    for parse in (
        lambda: names.parse("slots", "name", name),
        lambda: names.parse_instance("name", name),
    ):
        found = attempt(parse)
        if isinstance(found, ModelhostError):
            assert found.reason is Reason.INVALID_ARGUMENT


@pytest.mark.parametrize("collection", [*COLLECTIONS, "instances"])
def test_not_found_says_what_and_where(collection: str) -> None:
    """What is not there is NOT_FOUND, with the id under the key that the page of errors promises."""
    error = names.not_found(collection, "x", "look elsewhere")
    assert error.code is Code.NOT_FOUND
    assert set(error.metadata) == set(REASONS[error.reason].keys)
    assert error.message.endswith("; look elsewhere")


def test_a_model_that_is_not_there_has_a_next_step() -> None:
    """MODEL_NOT_FOUND says how to list models and how to add one."""
    message = names.model_not_found("x").message
    assert "modelhost ls" in message
    assert "modelhost pull" in message
