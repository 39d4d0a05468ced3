"""Chat templates: rendered as the model says, and stopped when they do what no template needs."""

import json
import os

import pytest

from modelhostd.worker.backend import BadInputError, InferContext
from modelhostd.worker.backends.generation import chat as chat_module
from modelhostd.worker.backends.generation.chat import MAX_MESSAGES_BYTES, ChatTemplate
from tests.worker.generation_models import TEMPLATE, Reader, flag, load, run, save_model, texts

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


@pytest.fixture
def chat():
    made = []

    def make(template, **tokens):
        made.append(ChatTemplate(template, tokens))
        return made[-1]

    yield make
    for one in made:
        one.close()


def render(template, messages=MESSAGES):
    """Render messages."""
    return template.render(json.dumps(messages).encode())


@pytest.mark.parametrize(
    "program", ["import signal; signal.pause()", "import sys; sys.stdin.readline(); 1/0"]
)
def test_a_process_that_does_not_answer_is_ended(chat, monkeypatch, tmp_path, program):
    """More than its pipe holds is not waited for either, and the next request has a new process."""
    (tmp_path / "chat.py").write_text(program)
    monkeypatch.setattr(chat_module, "_PROGRAM", tmp_path / "chat.py")
    monkeypatch.setattr(chat_module, "WALL_S", 0.3 if "pause" in program else chat_module.WALL_S)
    made = chat(TEMPLATE)
    with pytest.raises(BadInputError, match="a chat template that ends"):
        render(made, [{"role": "user", "content": "x" * 500_000}])
    monkeypatch.undo()
    long = "y" * 500_000
    assert render(made, [{"role": "user", "content": long}]) == f"<user>{long}\n<assistant>"


def test_messages_become_the_prompt_that_the_template_says(chat):
    """Roles, contents, special tokens and what templates of the Hub use besides."""
    assert render(chat(TEMPLATE)) == "<system>be brief\n<user>hi\n<assistant>"
    more = "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}"
    more += "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ messages | tojson }}"
    got = render(chat(more, bos_token="<s>"), [{"role": "user", "content": " <é> "}])
    assert got == '<s><é>[{"role": "user", "content": " <é> "}]'
    assert len(render(chat("{{ strftime_now('%Y') }}"))) == 4


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ ''['__class__'].mro() }}",
        "{% for x in range(10 ** 6) %}{% for y in range(10 ** 6) %}{% endfor %}{% endfor %}",
        "{% for x in range(90000) %}{% for y in range(90000) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'x'.center(10 ** 10) }}",
        "{% set n = namespace(t='xxxx') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}",
        "{% if %}",
    ],
)
def test_a_template_that_reaches_out_or_does_not_end_is_refused(chat, template):
    """Attributes of Python, endless loops and floods end in an error that names the messages' template."""
    made = chat(template)
    for _ in range(2):
        with pytest.raises(BadInputError) as caught:
            render(made)
        assert caught.value.field == "messages"
        assert caught.value.expected


def test_an_undefined_name_is_nothing(chat):
    """As in the library: what a message lacks is empty."""
    assert render(chat("[{{ messages[0].name }}]")) == "[]"


def test_half_characters_of_a_template_do_no_harm(chat):
    """What a template writes is text: a half of a surrogate pair in it becomes a question mark."""
    assert render(chat("<{{ '\\ud800' }}>")) == "<?>"


def test_the_process_is_used_again_and_replaced_when_it_ended(chat):
    """One process serves many requests; one that was stopped is followed by another."""
    made = chat("{% if messages | length > 1 %}{% for x in range(90000) %}{% for y in range(90000) %}"
                "{% endfor %}{% endfor %}{% endif %}ok")  # fmt: skip
    assert render(made, MESSAGES[:1]) == "ok"
    first = made._process.pid
    assert render(made, MESSAGES[:1]) == "ok"
    assert made._process.pid == first
    with pytest.raises(BadInputError):
        render(made)
    assert not os.path.exists(f"/proc/{first}")
    assert render(made, MESSAGES[:1]) == "ok"
    made.close()
    assert made._process is None


@pytest.mark.parametrize(
    ("encoded", "field"),
    [
        (b"{", "messages"),
        (b"\xff", "messages"),
        (b"[]", "messages"),
        (b"{}", "messages"),
        (b"[" * 50_000, "messages"),
        (b'[{"role": "user", "content": "\\ud800"}]', "messages"),
        (b"[" + b" " * MAX_MESSAGES_BYTES + b"]", "messages"),
        (json.dumps([{"role": "user", "content": "x"}] * 1025).encode(), "messages"),
        (b"[1]", "messages[0]"),
        (b'[{"content": "x"}]', "messages[0].role"),
        (b'[{"role": "user", "content": 5}]', "messages[0].content"),
        (b'[{"role": "user"}]', "messages[0].content"),
        (b'[{"role": "assistant", "content": null}]', "messages[0].content"),
        (b'[{"role": "assistant", "tool_calls": []}]', "messages[0].content"),
        (b'[{"role": "user", "content": [[[[[[[[[1]]]]]]]]]}]', "messages[0]"),
    ],
)
def test_messages_that_are_none_are_refused(chat, encoded, field):
    """What is wrong is named before any template sees it."""
    with pytest.raises(BadInputError) as caught:
        chat(TEMPLATE).render(encoded)
    assert caught.value.field == field


@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_a_message_that_calls_tools_says_nothing_besides(chat, content):
    """As conversations have it that were had with tools elsewhere."""
    calls = [{"type": "function", "function": {"name": "now", "arguments": {}}}]
    made = chat("{% for m in messages %}{{ m.tool_calls[0].function.name }}{% endfor %}")
    assert render(made, [{"role": "assistant", "tool_calls": calls, **content}]) == "now"


def test_a_model_takes_messages_where_it_has_a_template(tmp_path):
    """The same text comes from messages as from the prompt that they make."""
    save_model(tmp_path)
    backend = load(tmp_path)
    readers = [Reader(streaming=False) for _ in range(2)]
    context = InferContext({"max_tokens": 8})
    prompt = "<system>be brief\n<user>hi\n<assistant>"
    backend.begin({"text_input": texts(prompt)}, context, readers[0])
    given = {"messages": texts(json.dumps(MESSAGES)), "stream": flag(False)}
    backend.begin(given, context, readers[1])
    run(backend)
    assert readers[0].text == readers[1].text
    backend.unload()
    save_model(tmp_path, template=None)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    backend = load(tmp_path)
    with pytest.raises(BadInputError, match="no chat template"):
        backend.begin(given, context, Reader())
