"""Sixty-four askers over eight sequences, with cancellations, for as long as SOAK_MINUTES says.

Every request ends exactly once, no cell is lost, and memory stays where it was after the first fifth of the time.
"""

import asyncio
import gc
import os
import random
import time
from pathlib import Path

import numpy as np
import psutil

from opsin import Opsin
from opsin.api import question_about
from opsin.core.answer import Finished
from opsin.core.errors import Cancelled
from synth import write_pair

ASKERS, SEQUENCES, IMAGES, CTX = 64, 8, 24, 2048
MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))


def fill_the_context(model: Opsin) -> None:
    """Use all of llama.cpp's compute buffer once.

    It is reserved for the largest ubatch over a full context, and its pages count from their first use: 6 MiB of
    this process, which the load below reaches at a moment of its own.
    """
    question = question_about([], "what is this? " * 220)
    assert model.submit(question, max_tokens=1, ignore_eos=True).result().usage.prompt_tokens > CTX - 16
    alike = [model.submit(question_about([], "what is this? " * 200 + c), max_tokens=9) for c in "abcdefgh"]
    assert all(stream.result().usage.completion_tokens for stream in alike)


def test_many_askers_lose_nothing(tmp_path: Path) -> None:
    pair = write_pair("tiny", tmp_path)
    process = psutil.Process()
    ends: dict[str, int] = {"finished": 0, "cancelled": 0}
    early = 0
    start = time.monotonic()

    async def ask(model: Opsin, rng: random.Random) -> None:
        size = (rng.choice((40, 64, 120)), rng.choice((40, 56)))
        pixels = np.random.default_rng(rng.randrange(IMAGES)).integers(0, 255, (*size, 3), dtype=np.uint8)
        images = [model.image(pixels)] * rng.choice((0, 1, 1, 1, 2))
        question = "what is this? " * rng.choice((1, 1, 1, 8, 40, 80))
        give_up = rng.randrange(12) if rng.random() < 0.25 else None
        messages = question_about(images, question)
        stream = model.submit(messages, max_tokens=rng.choice((1, 8, 32, 64)), temperature=0.8, ignore_eos=True)
        seen = finished = 0
        try:
            async for event in stream:
                seen += 1
                finished += isinstance(event, Finished)
                if give_up is not None and seen > give_up and not finished:
                    stream.cancel()
        except Cancelled:
            assert finished == 0
            ends["cancelled"] += 1
            return
        assert finished == 1
        ends["finished"] += 1

    async def asker(model: Opsin, seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() - start < MINUTES * 60:
            await ask(model, rng)

    async def watch() -> int:
        await asyncio.sleep(MINUTES * 12)
        gc.collect()
        return process.memory_info().rss

    async def everybody(model: Opsin) -> int:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(asker(model, seed) for seed in range(ASKERS)))
        return await watching

    with Opsin(pair.llm, pair.mmproj, parallel=SEQUENCES, ctx=CTX, disk_cache=False) as model:
        fill_the_context(model)
        early = asyncio.run(everybody(model))
        # An idle engine compares its books with what llama.cpp holds; one more answer shows that it lives.
        assert model.submit(question_about([], "are you there?"), max_tokens=1).result().usage.completion_tokens == 1
        stats = model.engine.stats
        gc.collect()
        late = process.memory_info().rss
    growth = late / early - 1
    print(f"{ends}, {stats}, resident memory {early / 2**20:.1f} to {late / 2**20:.1f} MiB ({growth:+.2%})")
    assert ends["finished"] > ASKERS
    assert ends["cancelled"] > 0
    assert (stats.running, stats.waiting, stats.failed) == (0, 0, 0)
    assert growth <= 0.02
