"""The mark of a fallback model's answer, as protobuf reads it."""

from hypothesis import given
from hypothesis import strategies as st

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.core.names import ID
from modelhostd.core.stand_ins import mark


@given(st.from_regex(ID, fullmatch=True), st.booleans())
def test_the_mark_is_a_parameter(model: str, more: bool) -> None:
    """Behind an encoded response it is the parameter `fallback_model`, and nothing else changes."""
    response = oip.ModelInferResponse(model_name="a", model_version="1", id="x")
    response.outputs.add(name="y", datatype="FP32", shape=[1])
    response.raw_output_contents.append(b"1234")
    if more:
        response.parameters["sequence_id"].int64_param = 5
    marked = oip.ModelInferResponse.FromString(response.SerializeToString() + mark(model))
    assert marked.parameters.pop("fallback_model").string_param == model
    assert marked == response
