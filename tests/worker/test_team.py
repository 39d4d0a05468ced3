"""A worker whose models compute on the CPU has one OpenMP team, whatever it loads and runs."""

import asyncio
import dataclasses
import os
import threading

import pytest
import transformers

from modelhostd.core.resources import Health
from modelhostd.worker.team import Team, one_team, take_team
from tests.support import DEADLINE_S, wait_until, wait_until_async
from tests.worker.bert import EMBEDDING, byte_strings
from tests.worker.generation_models import flag, save_model, texts
from tests.worker.harness import CONFIG, decode, encode, ignore, numbers, running, spec

pytestmark = pytest.mark.timeout(540)

TEAM = 3
WORDS = "a cat sits on the mat ."
WORKER = dataclasses.replace(
    CONFIG,
    backends=(
        "transformers",
        "text-generation",
        "torch-module",
        "census = tests.worker.team_backend:CensusBackend",
    ),
    compute_threads=TEAM,
)


@pytest.fixture(scope="module")
def wide(tiny, tmp_path_factory):
    """Give the folder of a BERT with matrices that are worth several threads."""
    folder = tmp_path_factory.mktemp("wide")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        if (tiny / name).exists():
            (folder / name).write_bytes((tiny / name).read_bytes())
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=256, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=1024, max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


async def test_a_worker_has_one_team(wide, tmp_path):
    """No load (conversions, canary), request, batch, check or text leaves threads of OpenMP beside those of the one that computes."""
    save_model(tmp_path)

    async with running(WORKER) as (workers, _):

        async def foreign():
            payload = encode({"x": numbers(1)}, name="census")
            reply = await workers.infer("cpu", "census-1", 1, payload, timeout_s=DEADLINE_S)
            return decode(reply.payload)[1]["count"].tolist()

        async def has(*expected):
            # Threads that end are seen for a moment longer than Python knows them.
            await wait_until_async(lambda: is_now(expected))

        async def is_now(expected):
            return await foreign() == [*expected]

        async def embed(model, count, generation=1):
            payload = encode({"text": byte_strings([WORDS * 3] * count)}, name=model)
            reply = await workers.infer(
                "cpu", f"{model}-1", generation, payload, timeout_s=DEADLINE_S
            )
            assert decode(reply.payload)[1]["embedding"].shape == (count, 256)

        def embedder(model, generation=1):
            return spec(
                model, backend="transformers", task=EMBEDDING, model_dir=wide, generation=generation
            )

        await workers.load("cpu", spec("census", backend="census"), ignore)
        # torch keeps an idle pool of its own in that thread, beside OpenMP's.
        team, before = await foreign()
        await workers.load("cpu", embedder("first"), ignore)
        await has(team, before)
        await embed("first", 32)
        await has(team + TEAM - 1, before)
        half = embedder("half")
        half = dataclasses.replace(half, config=dataclasses.replace(half.config, precision="bf16"))
        await workers.load("cpu", half, ignore)
        await asyncio.gather(
            *(embed(model, count) for model in ("first", "half") for count in (1, 32, 80))
        )
        health, _ = await workers.check("cpu", "first-1", 1)
        assert health is Health.HEALTHY
        await workers.unload("cpu", "first-1", 1)
        await workers.load("cpu", embedder("first", generation=2), ignore)
        writer = spec("g", backend="text-generation", task="text-generation", model_dir=tmp_path)
        await workers.load("cpu", writer, ignore)
        prompt = {"text_input": texts("hello"), "stream": flag(False)}
        payload = encode(prompt, name="g", parameters={"max_tokens": 4})
        await asyncio.gather(
            embed("first", 32, 2), workers.infer("cpu", "g-1", 1, payload, timeout_s=DEADLINE_S)
        )
        await has(team + TEAM - 1, before)


@pytest.mark.parametrize(
    ("device", "given", "threads", "left"),
    [("cpu", "3", 3, "1"), ("sim-0", "4,2", 4, "1"), ("cuda-0", "3", 0, "3")],
)
def test_the_operators_number_of_threads_is_the_teams(monkeypatch, device, given, threads, left):
    """What OMP_NUM_THREADS said is for the thread that computes; a GPU's worker keeps it as it is."""
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert one_team(device) == threads
    assert os.environ["OMP_NUM_THREADS"] == left


def test_a_team_sleeps_while_other_programs_want_the_cores():
    """It does for a while after a fifth of its work was waiting for a core, with one thread more, and longer where that goes on."""
    pytest.importorskip("torch")
    team = Team(2)
    team.take()

    def holding():
        """Return how many threads hold a team: of all threads, others' may end meanwhile."""
        return [thread.name for thread in threading.enumerate()].count("idle-team")

    def looks(share):
        """Count the looks until it no longer sleeps."""
        team.decide(share)
        assert team.sleeps
        wait_until(lambda: holding() == 1)
        count = 0
        while team.sleeps:
            team.decide(0.0)
            count += 1
        wait_until(lambda: holding() == 0)
        return count

    team.decide(0.1)
    assert not team.sleeps
    assert [looks(0.3) for _ in range(6)] == [50, 100, 200, 400, 800, 800]
    team.decide(0.1)
    assert looks(0.9) == 50
    take_team(1)
