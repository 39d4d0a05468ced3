"""Linear layers by oneDNN: the same numbers as torch's own, of the same weights, and only where it was measured to be faster."""

import gc
import logging
import os
import subprocess
import sys
import weakref

import pytest
import torch
import transformers
from torch.nn import functional

from modelhostd.worker.backends import linear
from modelhostd.worker.backends.linear import MIN_ROWS, OneDnnLinear, adapt, use_onednn
from modelhostd.worker.image.images import Images
from tests.worker.bert import ask, load, tiny_config

AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n"
INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\n"

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not linear.works(), reason="torch has no oneDNN here"),
]


@pytest.fixture
def wanted(monkeypatch):
    """Have any CPU be one on which oneDNN is faster, and any layer large enough."""
    monkeypatch.setattr(linear, "is_of_use", lambda: True)
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)


def layer(inputs=48, outputs=96, *, bias=True, dtype=torch.float32):
    """Return an adapted layer with random weights, in a module of its own."""
    module = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype))
    adapt(module.requires_grad_(False).eval(), 0)
    return module


def intermediate(kind=transformers.models.bert.modeling_bert.BertIntermediate, **config):
    """Return the adapted part of a BERT that is GELU of a linear layer."""
    module = torch.nn.Sequential(kind(tiny_config(**config))).requires_grad_(False).eval()
    adapt(module, 0)
    return module


@pytest.mark.parametrize(
    "shape", [(128, 48), (131, 48), (1, 1000, 48), (7, 33, 48), (2, 3, 40, 48)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_many_rows_give_what_torch_gives(shape, bias):
    """Items and tokens of any number, with a bias and without one: within 1e-5 of torch's own layer, in the same shape."""
    module = layer(bias=bias)
    rows = torch.randn(shape)
    with torch.inference_mode():
        answer = module(rows)
    assert type(module[0]) is OneDnnLinear
    expected = functional.linear(rows, module[0].weight, module[0].bias)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "cut",
    [
        lambda rows: rows[:, :48],
        lambda rows: rows[:, 1:49],
        lambda rows: rows[::2, :48],
        lambda rows: rows[:48].t(),
        lambda rows: rows[:1, :48].expand(200, 48),
    ],
    ids=["part", "part-inside", "every-second", "turned", "repeated"],
)
def test_rows_may_lie_anyhow(cut):
    """Rows that are a part of others, far from each other, turned or repeated are taken as torch's own layer takes them."""
    rows = cut(torch.randn(400, 400))
    module = layer()
    expected = functional.linear(rows, module[0].weight, module[0].bias)
    torch.testing.assert_close(module(rows), expected, atol=1e-5, rtol=1e-5)


def test_few_rows_stay_as_they_were():
    """Below the least number of rows the numbers are MKL's, to the last bit."""
    module = layer()
    for rows in (torch.randn(MIN_ROWS - 1, 48), torch.randn(48), torch.randn(0, 48)):
        expected = functional.linear(rows, module[0].weight, module[0].bias)
        assert torch.equal(module(rows), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_left_alone(dtype):
    """What torch gives to oneDNN itself, or oneDNN does not take, is computed as before."""
    assert type(layer(dtype=dtype)[0]) is torch.nn.Linear


def test_shapes_with_few_weights_are_left_alone():
    """A program is worth its making where many weights share it: of several layers, or of one large one."""
    sizes = [(8, 8), (8, 8), (8, 4), (16, 8)]
    module = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes))
    adapt(module, 128)
    assert [type(layer) is OneDnnLinear for layer in module] == [True, True, False, True]


def test_layers_of_other_classes_are_left_alone():
    """A class derived from torch's may compute otherwise."""

    class Doubled(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    module = torch.nn.Sequential(Doubled(4, 4))
    adapt(module, 0)
    assert type(module[0]) is Doubled


def test_gelu_goes_with_its_layer():
    """For many rows GELU is applied with the product, to 1e-5 of one after the other; for few nothing changes."""
    module = intermediate()
    few, many = torch.randn(1, 5, 32), torch.randn(8, 33, 32)
    expected = [
        functional.gelu(functional.linear(rows, module[0].dense.weight, module[0].dense.bias))
        for rows in (few, many)
    ]
    assert isinstance(module[0], linear._WithGelu)
    assert torch.equal(module(few), expected[0])
    torch.testing.assert_close(module(many), expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("act", ["gelu_new", "relu", "gelu_python"])
def test_other_activations_are_left_alone(act):
    """Only the exact GELU is oneDNN's."""
    assert not isinstance(intermediate(hidden_act=act)[0], linear._WithGelu)


class Scaled(transformers.models.bert.modeling_bert.BertIntermediate):
    """Answers more than GELU of its layer."""

    def forward(self, hidden_states):
        return 1.5 * super().forward(hidden_states)


class Shifting(transformers.models.bert.modeling_bert.BertIntermediate):
    """Has a weight of its own, which does nothing yet."""

    def __init__(self, config):
        super().__init__(config)
        self.shift = torch.nn.Parameter(torch.zeros(64))

    def forward(self, hidden_states):
        return super().forward(hidden_states) + self.shift


@pytest.mark.parametrize("kind", [Scaled, Shifting])
def test_a_module_that_does_more_is_left_alone(kind):
    """The same parts do not suffice: there is nothing else, and the answer is GELU of the linear layer."""
    assert type(intermediate(kind)[0]) is kind


def test_swaps_change_no_bit():
    """Weights that leave the device and come back to another place are found there; answers are bit-equal."""
    module = torch.nn.Sequential(*layer(), *intermediate(), *layer(64, 32))
    module[1].dense = layer(96, 64)[0]
    rows = torch.randn(300, 48)
    images = Images("sim-0")
    image = images.new()
    first = module(rows)
    image.adopt(module)
    for _ in range(3):
        assert torch.equal(module(rows), first)
        image.evict()
        image.swap_in(lambda: False)
    assert torch.equal(module(rows), first)
    del module
    images.close(image)


def test_an_adapted_module_is_no_cycle():
    """It goes with its last name, not when the collector comes: its weights must not outlive an unload."""
    module = intermediate()
    gone = weakref.ref(module[0].dense)
    gc.disable()
    try:
        del module
        assert gone() is None
    finally:
        gc.enable()


def test_a_served_model_answers_as_before(tiny, monkeypatch):
    """Embeddings of a batch with many tokens are within 1e-5 of those without oneDNN, and its modules have been adapted."""
    texts = ["the cat sits on the mat . " * 3] * 31 + ["a cat"]
    answers = []
    monkeypatch.setattr(linear, "MIN_WEIGHTS", 0)
    for wanted in (False, True):
        monkeypatch.setattr(linear, "is_of_use", lambda wanted=wanted: wanted)
        backend = load(tiny)
        kinds = {type(module) for module in backend.torch_module().modules()}
        assert (OneDnnLinear in kinds) == wanted
        answers.append(torch.from_numpy(ask(backend, texts)["embedding"]))
        assert backend.health_check().ok
    torch.testing.assert_close(answers[1], answers[0], atol=1e-5, rtol=0)


@pytest.mark.usefixtures("wanted")
def test_only_models_on_the_cpu_are_adapted():
    """What goes to a GPU stays as it is."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    use_onednn(module, torch.device("cuda:0"))
    assert type(module[0]) is torch.nn.Linear
    use_onednn(module, torch.device("cpu"))
    assert type(module[0]) is OneDnnLinear


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "slower"),
    [
        (AMD, "AVX512", True),
        (AMD, "AVX2", False),
        (INTEL, "AVX512", False),
        (ARM, "DEFAULT", False),
        ("", "AVX512", False),
    ],
)
def test_it_is_taken_where_it_was_measured(cpuinfo, capability, slower):
    """AMD CPUs with AVX-512; elsewhere nobody knows that it is faster."""
    assert linear.mkl_is_slower(cpuinfo, capability) == slower


def test_an_operator_can_switch_it_off(monkeypatch):
    """With no place for oneDNN's programs it is not used; without a word of an operator there are 128."""
    monkeypatch.setattr(linear, "mkl_is_slower", lambda cpuinfo, capability: True)
    monkeypatch.setattr(linear, "works", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    found = []
    for given in ("0", "none", "16", None):
        # First set, so that what is set meanwhile goes with the test.
        for name in (linear.CAPACITY, linear.TORCH_CAPACITY):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        if given:
            monkeypatch.setenv(linear.CAPACITY, given)
        used = linear.is_of_use.__wrapped__()
        found.append((used, os.environ[linear.CAPACITY], os.environ.get(linear.TORCH_CAPACITY)))
    assert found == [
        (False, "0", None),
        (False, "none", None),
        (True, "16", "16"),
        (True, "128", "128"),
    ]


def test_switched_off_products_in_half_precision_go_on(tmp_path):
    """These are oneDNN's everywhere: torch ended the process at the first of them where it was told to keep no programs."""
    script = tmp_path / "half.py"
    script.write_text(
        "import torch\n"
        "from modelhostd.worker.backends import linear\n"
        "linear.mkl_is_slower = lambda cpuinfo, capability: True\n"
        "assert not linear.is_of_use()\n"
        "rows = torch.ones(64, 64, dtype=torch.bfloat16)\n"
        "with torch.inference_mode():\n"
        "    print(torch.nn.functional.linear(rows, rows)[0, 0].item())\n"
    )
    environ = {**os.environ, linear.CAPACITY: "0"}
    environ.pop(linear.TORCH_CAPACITY, None)
    ran = subprocess.run(
        [sys.executable, script],
        env=environ,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "64.0\n"), ran.stderr


@pytest.mark.parametrize(
    ("answer", "logged"),
    [
        (AttributeError("'_OpNamespace' 'mkldnn' object has no attribute"), "has no attribute"),
        (RuntimeError("could not create a primitive"), "could not create"),
        (torch.zeros(3, 48), "answers otherwise"),
    ],
)
def test_a_torch_without_the_operator_stays_with_mkl(answer, logged, monkeypatch, caplog):
    """Where it is absent, refuses or gives other numbers nothing is adapted, and the log says why."""

    def other(*rows, gelu=False):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(linear, "_linear", other)
    with caplog.at_level(logging.INFO, "modelhost.worker"):
        assert not linear.works()
    assert logged in caplog.text
