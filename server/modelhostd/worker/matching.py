"""Whether a request fits a model: its tensors against the signature, its outputs, its batch.

Every refusal is INVALID_ARGUMENT with the field, what is expected and what came; of an answer that no message holds
MESSAGE_TOO_LARGE.
"""

from collections.abc import Container, Mapping, Sequence

from modelhost.oip import open_inference_pb2 as oip
from modelhostd.core.errors import ModelhostError
from modelhostd.worker import failures
from modelhostd.worker.backend import Signature, Tensor, TensorSpec
from modelhostd.worker.classification import Top
from modelhostd.worker.tensors import MAX_NAME_CHARACTERS, least_bytes, refuse

_NO_TOPS: Mapping[str, Top] = {}


def check_name(name: str, field: str, model: str) -> None:
    """Refuse an empty or endless tensor name."""
    if not 0 < len(name) <= MAX_NAME_CHARACTERS:
        raise refuse(
            f"a tensor of the request for model '{model}' has a name of {len(name)} characters",
            f"{field}.name",
            f"1 to {MAX_NAME_CHARACTERS} characters",
            len(name),
        )


def match(signature: Signature, inputs: Mapping[str, Tensor], model: str) -> None:
    """Check inputs against a signature. Raises INVALID_ARGUMENT for the set that comes nearest."""
    if not signature.inputs:
        return
    nearest: ModelhostError | None = None
    has_names = False
    for group in (signature.inputs, *signature.alternatives):
        error = _mismatch(group, inputs, model)
        if error is None:
            return
        # A set that has all the names, of these one of which nothing is missing; else the first.
        has_all = {spec.name for spec in group} >= inputs.keys()
        whole = error.metadata["field"] != "inputs"
        if nearest is None or (
            has_all and (not has_names or (whole and nearest.metadata["field"] == "inputs"))
        ):
            nearest, has_names = error, has_all
    assert nearest is not None
    raise nearest


def _mismatch(
    group: Sequence[TensorSpec], inputs: Mapping[str, Tensor], model: str
) -> ModelhostError | None:
    specs = {spec.name: spec for spec in group}
    names = ", ".join(specs)
    for name in inputs:
        if name not in specs:
            return refuse(
                f"unexpected inference input '{name}' for model '{model}'. Allowed inputs are: "
                f"{names}",
                "inputs",
                names,
                name,
            )
    for name, spec in specs.items():
        tensor = inputs.get(name)
        if tensor is None:
            if spec.optional:
                continue
            needed = [spec.name for spec in group if not spec.optional]
            found = sum(name in inputs for name in needed)
            return refuse(
                f"expected {len(needed)} inputs but got {found} inputs for model '{model}'. "
                f"Missing: '{name}'",
                "inputs",
                names,
                ", ".join(inputs) or "none",
            )
        if tensor.datatype != spec.datatype:
            return refuse(
                f"inference input '{name}' data-type is '{tensor.datatype}', but model '{model}' "
                f"expects '{spec.datatype}'",
                f"inputs[{name}].datatype",
                spec.datatype,
                tensor.datatype,
            )
        shape = tensor.array.shape
        if len(shape) != len(spec.shape) or any(
            want not in (-1, size) for want, size in zip(spec.shape, shape, strict=True)
        ):
            return refuse(
                f"unexpected shape for input '{name}' for model '{model}'. Expected "
                f"{list(spec.shape)}, got {list(shape)}",
                f"inputs[{name}].shape",
                str(list(spec.shape)),
                list(shape),
            )
    return None


def count_items(signature: Signature, inputs: Mapping[str, Tensor], model: str) -> int:
    """Return how many items a request holds, after checking them against the signature's bounds."""
    if not signature.batched:
        return 1
    counts = {name: tensor.array.shape[0] for name, tensor in inputs.items() if tensor.array.ndim}
    items = next(iter(counts.values()), 0)
    for name, count in counts.items():
        if count != items:
            raise refuse(
                f"input '{name}' for model '{model}' has {count} items and another input {items}",
                f"inputs[{name}].shape",
                f"{items} items",
                count,
            )
    if items == 0:
        raise refuse(
            f"the request for model '{model}' is an empty batch", "inputs", "1 item or more", 0
        )
    if 0 < signature.max_batch_size < items:
        raise refuse(
            f"inference request batch-size must be <= {signature.max_batch_size} for '{model}', "
            f"got {items}",
            "inputs",
            f"at most {signature.max_batch_size} items",
            items,
        )
    return items


def read_requested(
    request: oip.ModelInferRequest,
    signature: Signature,
    inputs: Mapping[str, Tensor],
    model: str,
) -> tuple[tuple[str, ...], Mapping[str, Top]]:
    """Return the names of the outputs that a request asks for (none = all), and of which it wants the top."""
    if not request.outputs:
        return (), _NO_TOPS
    specs = {spec.name: spec for spec in signature.outputs}
    known = specs.keys() or inputs.keys()
    wanted: dict[str, None] = {}
    tops: dict[str, Top] = {}
    for item in request.outputs:
        name = item.name
        check_name(name, "outputs", model)
        if name in wanted:
            raise refuse(
                f"output '{name}' already exists in request", "outputs", "each name once", name
            )
        if name not in known:
            # An identity model without inputs has none.
            names = ", ".join(sorted(known)) or "none"
            raise refuse(
                f"unexpected inference output '{name}' for model '{model}'. Known outputs are: "
                f"{names}",
                "outputs",
                names,
                name,
            )
        if "shared_memory_region" in item.parameters:
            raise refuse(
                f"Unable to find shared memory region: output '{name}' for model '{model}' names "
                "one, and this server has none; ask for the output without it",
                f"outputs[{name}].parameters",
                "no shared_memory_region",
                "shared_memory_region",
            )
        if "classification" in item.parameters:
            labels = specs[name].labels if name in specs else ()
            count = _read_count(name, item.parameters["classification"], model)
            tops[name] = Top(count, labels, signature.batched)
        wanted[name] = None
    return tuple(wanted), tops


def check_answer(
    signature: Signature,
    outputs: Sequence[str],
    tops: Container[str],
    items: int,
    most_bytes: int,
) -> None:
    """Refuse what would be computed in vain: its answer has more than ``most_bytes``, as the signature alone tells."""
    if signature.decoupled:
        return
    least = 0
    for spec in signature.outputs:
        if spec.name in tops or (outputs and spec.name not in outputs):
            continue
        whole = signature.batched and spec.shape[:1] == (-1,)
        least += least_bytes(spec.datatype, (items, *spec.shape[1:]) if whole else spec.shape)
    if least > most_bytes:
        raise failures.answer_too_large(least, most_bytes)


def _read_count(name: str, parameter: oip.InferParameter, model: str) -> int:
    choice = parameter.WhichOneof("parameter_choice")
    count = getattr(parameter, choice) if choice in ("int64_param", "uint64_param") else 0
    if count < 1:
        shown = count if choice in ("int64_param", "uint64_param") else choice
        raise refuse(
            f"classification of output '{name}' for model '{model}' is {shown}: it is how many "
            "classes to return",
            f"outputs[{name}].classification",
            "an integer from 1",
            shown,
        )
    return int(count)
