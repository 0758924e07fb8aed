#!/usr/bin/env python3
"""Full batches: how fast many sequences decode together, what JSON schemas cost, and llama.cpp's own rate beside it.

    python bench/batched_bench.py --model m.gguf --program llama-batched-bench --runs 4 --json-out batched.json

Every run measures plain answers, answers held to a JSON schema and, with `--program`, bare decode calls of the same
sizes by `llama-batched-bench`, in turn. With `--mmproj` every prompt begins with an image of its own. Needs the package
`opsin`; this checkout's is used where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))

from opsin.bench.workloads import image_file
from opsin.compose import Runtime, open_runtime
from opsin.core.answer import Answer, Finished, TextDelta
from opsin.core.errors import BadInput, BadParameter, OpsinError
from opsin.core.request import Prompt, SamplingParams
from opsin.core.settings import EngineSettings, ImageSettings
from opsin.engine import AnswerStream, Engine, Snapshot
from opsin.images import load_image
from opsin.prompt import Message

TOKENS = 128
FEWEST_STEPS = 16
TRIES = 5  # a busy machine may keep the sequences from beginning together
PROGRAM_SECONDS = 600.0
SCHEMA = '{"type": "object", "properties": {"description": {"type": "string"}}, "required": ["description"]}'
# At temperature 1 a model of random weights does not repeat itself, which the guard would end.
SAMPLING = SamplingParams(temperature=1.0, max_tokens=TOKENS)
_FILLER = " and"
_TRIAL_FILLERS = 32
_FIRST_IMAGE = 70_000  # no other bench has these


@dataclass(frozen=True, slots=True)
class Batch:
    """While all sequences were being answered: tokens per second, and those of the decode calls alone.

    Shares are of the wall time: decode calls, sampling, and the rest, which is Python's.
    """

    sequences: int
    steps: int
    prompt_tokens: int
    tokens_s: float
    decode_tokens_s: float
    decode_share: float
    sample_share: float

    @property
    def other_seconds(self) -> float:
        """Time per token beside the decode calls."""
        return (1 - self.decode_share) / self.tokens_s


@dataclass(slots=True)
class Window:
    """From the first token of the last answer to the end of the first one: then the batch is full."""

    engine: Engine
    sequences: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    started: int = 0
    begin: tuple[float, Snapshot] | None = None
    end: tuple[float, Snapshot] | None = None
    answers: list[Answer] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def follow(self, stream: AnswerStream) -> None:
        """Read one answer, in a thread of its own."""
        begun = False
        try:
            for event in stream:
                with self.lock:
                    if isinstance(event, TextDelta) and not begun:
                        begun = True
                        self.started += 1
                        if self.started == self.sequences:
                            self.begin = (time.perf_counter(), self.engine.stats)
                    elif isinstance(event, Finished):
                        self.end = self.end or (time.perf_counter(), self.engine.stats)
                        self.answers.append(event.answer)
        except OpsinError as error:
            self.errors.append(error)

    def result(self) -> Batch:
        """What was seen. Raises BadInput if the batch was full for too short a time."""
        if self.errors:
            raise self.errors[0]
        if self.begin is None or self.end is None or self.end[0] <= self.begin[0]:
            raise BadInput("The sequences were never all answered together.")
        (began, before), (ended, after) = self.begin, self.end
        steps, tokens = after.decode_steps - before.decode_steps, after.decode_tokens - before.decode_tokens
        if steps < FEWEST_STEPS:
            raise BadInput(f"The sequences were answered together for {steps} steps only.")
        wall, decode = ended - began, after.decode_seconds - before.decode_seconds
        # A step's sampling is in the stages of each of its sequences.
        sample_s = median(a.stages.sample_ms / max(1, a.usage.completion_tokens) for a in self.answers) / 1e3 * steps
        return Batch(
            self.sequences,
            steps,
            prompt_tokens=int(median(answer.usage.prompt_tokens for answer in self.answers)),
            tokens_s=tokens / wall,
            decode_tokens_s=tokens / decode,
            decode_share=min(1.0, decode / wall),
            sample_share=min(1.0, sample_s / wall),
        )


def measure_batch(
    runtime: Runtime,
    sequences: int,
    *,
    prompt_tokens: int = 0,
    schema: str | None = None,
    sampling: SamplingParams = SAMPLING,
    images: bool = False,
) -> Batch:
    """Let so many answers run together, with sampling, guard and events. Raises BadInput, EngineError.

    With `images` each is about an image of its own, which is in the KV cache before.
    """
    params = sampling.model_copy(update={"ignore_eos": schema is None, "json_schema": schema})
    filler = _FILLER * fillers(runtime, prompt_tokens)
    prompts = [_prompt(runtime, number, filler, image=images) for number in range(sequences)]
    if images:
        # Otherwise the first answers would end before the last image is encoded, and the batch be never full.
        short = params.model_copy(update={"json_schema": None, "max_tokens": 1})
        for stream in [runtime.engine.submit(prompt, short) for prompt in prompts]:
            stream.result()
    for _ in range(TRIES - 1):
        with suppress(BadInput):
            return _measure_once(runtime, prompts, params)
    return _measure_once(runtime, prompts, params)


def _prompt(runtime: Runtime, number: int, filler: str, *, image: bool = False) -> Prompt:
    image_of = [load_image(image_file(_FIRST_IMAGE + number), ImageSettings())] if image else []
    return runtime.prompts.build([Message("user", [*image_of, f"{number}: tell me all about it.{filler}"])])


def _measure_once(runtime: Runtime, prompts: list[Prompt], params: SamplingParams) -> Batch:
    window = Window(runtime.engine, len(prompts))
    readers = []
    for number, prompt in enumerate(prompts):
        stream = runtime.engine.submit(prompt, params.model_copy(update={"seed": number}))
        readers.append(threading.Thread(target=window.follow, args=(stream,), daemon=True))
        readers[-1].start()
    for reader in readers:
        reader.join()
    return window.result()


def fillers(runtime: Runtime, prompt_tokens: int) -> int:
    """How many fillers make a prompt of about so many tokens."""
    if not prompt_tokens:
        return 0

    def length(count: int) -> int:
        prompt = _prompt(runtime, 0, _FILLER * count)
        return runtime.engine.submit(prompt, SamplingParams(max_tokens=1)).result().usage.prompt_tokens

    short, long = length(0), length(_TRIAL_FILLERS)
    return max(0, round((prompt_tokens - short) * _TRIAL_FILLERS / max(1, long - short)))


def program_rate(
    program: Path,
    model: Path,
    *,
    sequences: int,
    prompt_tokens: int,
    n_ctx: int,
    threads: int | None,
    flash: bool | None,
) -> float:
    """Tokens per second of `llama-batched-bench`, without sampling. Raises BadParameter if it cannot be run."""
    options: dict[str, Any] = {
        "-m": model,
        "-c": n_ctx,
        "-npp": prompt_tokens,
        "-ntg": TOKENS,
        "-npl": sequences,
        "--output-format": "jsonl",
    }
    options |= {"-t": threads, "-tb": threads} if threads else {}
    options |= {} if flash is None else {"-fa": "on" if flash else "off"}
    command = [str(program), *(str(word) for option in options.items() for word in option), "--kv-unified"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PROGRAM_SECONDS)
    except OSError as error:
        raise BadParameter(f"{program} cannot be run: {error.strerror or error}.") from error
    except subprocess.SubprocessError as error:
        raise BadParameter(f"{program} failed: {error}.") from error
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            return float(json.loads(line)["speed_tg"])
    raise BadParameter(f"{program} printed no result: is it llama-batched-bench?")


def document(plain: list[Batch], schema: list[Batch], rates: list[float]) -> dict[str, Any]:
    """Medians and runs as JSON values.

    `json_schema_cost` is the share of the plain rate that schemas cost, from the time beside the decode calls alone:
    those compute the same, and a busy machine changes their time by more than the whole difference.
    """
    found: dict[str, Any] = {
        "tokens_s": median(run.tokens_s for run in plain),
        "decode_tokens_s": median(run.decode_tokens_s for run in plain),
        "runs": [asdict(run) for run in plain],
    }
    if schema:
        extra = median(b.other_seconds - a.other_seconds for a, b in zip(plain, schema, strict=True))
        found |= {
            "json_schema_tokens_s": median(run.tokens_s for run in schema),
            "json_schema_cost": extra / (1 / max(run.tokens_s for run in plain) + extra),
            "json_schema_runs": [asdict(run) for run in schema],
        }
    if rates:
        found |= {
            "llama_batched_bench_tokens_s": median(rates),
            "of_llama_batched_bench": median(run.tokens_s / rate for run, rate in zip(plain, rates, strict=True)),
            "llama_batched_bench_runs": rates,
        }
    return found


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Load the model and measure; the document of all runs so far, after each of them.

    Raises BadInput, BadParameter, EngineError, ModelError.
    """
    settings = EngineSettings(
        ctx=given.ctx,
        parallel=given.sequences,
        threads=given.threads,
        flash_attention=given.flash,
        disk_cache=False,
    )
    plain, schema, rates = list[Batch](), list[Batch](), list[float]()
    images, texts = given.mmproj is not None, (None, SCHEMA) if given.schema else (None,)
    with closing(open_runtime(given.model, given.mmproj, settings)) as runtime:
        about = {
            "model": runtime.engine.info.as_dict(),
            "settings": settings.model_dump(mode="json", exclude_unset=True),
        }
        for run in range(given.runs):
            sys.stderr.write(f"run {run + 1} of {given.runs}\n")
            # Every second run begins with the schema, so that neither always follows the other.
            for text in texts if run % 2 == 0 else texts[::-1]:
                batch = measure_batch(
                    runtime, given.sequences, prompt_tokens=given.prompt_tokens, schema=text, images=images
                )
                (schema if text else plain).append(batch)
            if given.program is not None:
                rates.append(
                    program_rate(
                        given.program,
                        given.model,
                        sequences=given.sequences,
                        prompt_tokens=plain[-1].prompt_tokens,
                        n_ctx=runtime.engine.limits.n_ctx,
                        threads=given.threads,
                        flash=given.flash,
                    )
                )
            yield about | document(plain, schema, rates)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the document, and write it to `--json-out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="language model, a GGUF file")
    parser.add_argument("--mmproj", type=Path, help="projector: every prompt begins with an image of its own")
    parser.add_argument("--sequences", type=int, default=8, help="sequences in one batch (default: 8)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=0, help="tokens of each prompt (default: a short question)"
    )
    parser.add_argument("--ctx", type=int, default=8192, help="context size in tokens, shared by all (default: 8192)")
    parser.add_argument("--threads", type=int, help="CPU threads for decoding")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; medians are shown (default: 3)")
    parser.add_argument("--program", type=Path, help="path of llama-batched-bench")
    parser.add_argument(
        "--schema", action=argparse.BooleanOptionalAction, default=True, help="also measure answers held to a schema"
    )
    parser.add_argument("--flash", action=argparse.BooleanOptionalAction, help="flash attention on both sides")
    parser.add_argument("--json-out", type=Path, help="also write the JSON document to this file")
    given = parser.parse_args(arguments)
    for result in measure(given):
        if given.json_out is not None:  # at once: a run that is cut off leaves what it had
            given.json_out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    try:
        main()
    except OpsinError as error:
        sys.exit(f"batched_bench: {error}")
