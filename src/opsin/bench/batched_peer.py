"""llama.cpp's own measure of full batches, run beside the engine's: `llama-batched-bench`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from opsin.core.errors import BadParameter

TIMEOUT_S = 600.0


def measure_peer(
    program: Path,
    model: Path,
    *,
    sequences: int,
    prompt: int,
    tokens: int,
    threads: int,
    n_ctx_seq: int,
    shared: bool,
    flash: bool | None = None,
) -> float:
    """Tokens a second of bare decode calls, `sequences` at a time behind prompts of `prompt` tokens, without sampling.

    The type of the KV memory and offloading are the program's defaults, not the engine's; so is flash attention,
    unless `flash` says it.

    Raises BadParameter when the program cannot be run or prints no result.
    """
    options = {
        "-m": model,
        "-c": n_ctx_seq * sequences,
        "-npp": prompt,
        "-ntg": tokens,
        "-npl": sequences,
        "-t": threads,
        "-tb": threads,
        "--output-format": "jsonl",
    }
    command = [str(program), *(str(word) for option in options.items() for word in option)]
    if shared:
        command.append("--kv-unified")
    if flash is not None:
        command += ["-fa", "on" if flash else "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)  # noqa: S603 - the user names the program
    except OSError as error:
        raise BadParameter(f"{program} cannot be run: {error.strerror or error}.") from error
    except subprocess.SubprocessError as error:
        raise BadParameter(f"{program} failed: {error}.") from error
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            return float(json.loads(line)["speed_tg"])
    raise BadParameter(f"{program} printed no result: is it llama-batched-bench?")
