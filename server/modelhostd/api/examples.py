"""Examples to copy, made from what a loaded model says of itself: Python, `tritonclient`, `buf curl`. Pure."""

import base64
import json
import math
import shlex
from collections.abc import Mapping, Sequence

from modelhostd.ports import TensorSpec

NUMBERS_MAX = 256
"""Of one example: what needs more is nothing to copy."""

_ANY = (TensorSpec("x", "FP32", (1, 4)),)
_TEXT = "a first text"
_PROMPT = "Once upon a time"
_NUMPY = {
    "BOOL": "np.bool_",
    "FP16": "np.float16",
    "FP32": "np.float32",
    "FP64": "np.float64",
    "BF16": "np.float32",
}
_CONTENTS = {
    "BOOL": "bool_contents", "INT64": "int64_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
}  # fmt: skip
_NEEDED = {
    "Embed": ("text", "embedding"),
    "Classify": ("text", "scores"),
    "Generate": ("text_input", "text_output"),
}
"""The input and the output that a method works with."""


def method_for(method: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> str:
    """Return the method of a model's task where its inputs and outputs are that task's; else nothing."""
    wanted = _NEEDED.get(method)
    names = {one.name for one in (*inputs, *outputs)}
    return method if wanted and names.issuperset(wanted) else ""


def examples(
    model: str,
    method: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    address: str,
) -> Mapping[str, str]:
    """Return examples by tool. ``method`` empty = ModelInfer; ``address`` is ``host:port``."""
    if method:
        (first,) = (one for one in inputs if one.name == _NEEDED[method][0])
        sent: Sequence[TensorSpec] = (TensorSpec(first.name, first.datatype, (1,)),)
    else:
        sent = tuple(TensorSpec(one.name, one.datatype, _sizes(one)) for one in inputs or _ANY)
    made = {
        "python": _python(model, method, sent),
        "tritonclient": _triton(model, sent, outputs or sent, address),
    }
    if sum(math.prod(one.shape) for one in sent) <= NUMBERS_MAX:
        made["buf curl"] = _buf(model, method, sent, address)
    return made


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(1 if size < 0 else size for size in spec.shape)


def _array(spec: TensorSpec) -> str:
    """Return the expression of an array of zeros, or of texts."""
    shape = list(spec.shape)
    if spec.datatype == "BYTES":
        text = _PROMPT if spec.name == "text_input" else _TEXT
        return f"np.full({shape}, {json.dumps(text)}, dtype=object)"
    dtype = _NUMPY.get(spec.datatype) or f"np.{spec.datatype.lower()}"
    return f"np.zeros({shape}, dtype={dtype})"


def _python(model: str, method: str, sent: Sequence[TensorSpec]) -> str:
    name = json.dumps(model)
    head = "from modelhost import Client\n\nwith Client() as host:\n"
    if method == "Embed":
        call = f'    vectors = host.embed({name}, [{json.dumps(_TEXT)}, "another"])\n'
        return head + call + "    print(vectors.shape, vectors.dtype)\n"
    if method == "Classify":
        call = f'    for found in host.classify({name}, [{json.dumps(_TEXT)}, "another"]):\n'
        return head + call + "        print(found.label, found.score)\n"
    if method == "Generate":
        call = f"    for piece in host.generate({name}, {json.dumps(_PROMPT)}, stream=True, max_tokens=40):\n"
        return head + call + '        print(piece, end="", flush=True)\n'
    arrays = "".join(f"        {json.dumps(one.name)}: {_array(one)},\n" for one in sent)
    datatypes = {one.name: "BF16" for one in sent if one.datatype == "BF16"}
    more = f", datatypes={json.dumps(datatypes)}" if datatypes else ""
    return (
        f"import numpy as np\n\n{head}    inputs = {{\n{arrays}    }}\n"
        f"    for name, array in host.infer({name}, inputs{more}).items():\n"
        "        print(name, array.dtype, array.shape)\n"
    )


def _triton(
    model: str, sent: Sequence[TensorSpec], outputs: Sequence[TensorSpec], address: str
) -> str:
    # It takes no other array for BF16, and brings this library.
    bf16 = ["import ml_dtypes"] if any(one.datatype == "BF16" for one in sent) else []
    lines = [
        *bf16,
        "import numpy as np",
        "import tritonclient.grpc as triton",
        "",
        f"client = triton.InferenceServerClient({json.dumps(address)})",
        "inputs = []",
    ]
    for one in sent:
        tensor = f"triton.InferInput({json.dumps(one.name)}, {list(one.shape)}, {json.dumps(one.datatype)})"
        array = _array(one)
        if one.datatype == "BF16":
            array = array.replace("np.float32", "ml_dtypes.bfloat16")
        lines += [f"inputs.append({tensor})", f"inputs[-1].set_data_from_numpy({array})"]
    lines.append(f"result = client.infer({json.dumps(model)}, inputs)")
    lines += [f"print(result.as_numpy({json.dumps(one.name)}))" for one in outputs]
    return "\n".join(lines) + "\n"


def _buf(model: str, method: str, sent: Sequence[TensorSpec], address: str) -> str:
    if method == "Generate":
        sampling = {"max_tokens": 40}
        request: dict[str, object] = {
            "model": f"models/{model}",
            "prompt": _PROMPT,
            "sampling": sampling,
        }
    elif method:
        request = {"model": f"models/{model}", "texts": [_TEXT, "another"]}
    else:
        request = {"model_name": model, "inputs": [_tensor(one) for one in sent]}
        if any(one.datatype not in _CONTENTS for one in sent):
            # Numbers of 16 bits have no typed form, and a request has one form for all its tensors.
            request["inputs"] = [
                {k: v for k, v in _tensor(one).items() if k != "contents"} for one in sent
            ]
            request["raw_input_contents"] = [_base64(_raw(one)) for one in sent]
    path = (
        f"modelhost.v1.InferenceService/{method}"
        if method
        else "inference.GRPCInferenceService/ModelInfer"
    )
    return (
        "buf curl --protocol grpc --http2-prior-knowledge \\\n"
        f"    -d {shlex.quote(json.dumps(request))} \\\n"
        f"    http://{address}/{path}\n"
    )


def _tensor(spec: TensorSpec) -> dict[str, object]:
    count = math.prod(spec.shape)
    element: object = {"BYTES": _base64(_TEXT.encode()), "BOOL": False}.get(spec.datatype, 0)
    contents = {_CONTENTS.get(spec.datatype, ""): [element] * count}
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape, "contents": contents}


def _raw(spec: TensorSpec) -> bytes:
    """Return the raw contents of zeros, or of texts."""
    count = math.prod(spec.shape)
    if spec.datatype == "BYTES":
        text = _TEXT.encode()
        return (len(text).to_bytes(4, "little") + text) * count
    bits = int("".join(c for c in spec.datatype if c.isdigit()) or "8")
    return bytes(count * bits // 8)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
