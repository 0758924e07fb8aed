"""What can be measured: the engine in this process, and any OpenAI-compatible vision server."""

import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import httpx

from opsin.bench.workloads import Driver, RequestFailed
from opsin.core.answer import Finished, TextDelta, Usage
from opsin.core.errors import BadParameter, Cancelled
from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings, ImageSettings, as_flags
from opsin.engine import Engine
from opsin.images import load_image
from opsin.prompt import Message, PromptBuilder

_TIMEOUT_S = 300.0


def engine_driver(engine: Engine, prompts: PromptBuilder) -> Driver:
    """Does what a server does with a question, without the network. Its answers raise BadInput, EngineError."""

    def ask(image: bytes, question: str, max_tokens: int) -> Generator[float, None, Usage]:
        prompt = prompts.build([Message("user", [load_image(image, ImageSettings()), question])])
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, guard=False)
        for event in engine.submit(prompt, params):
            if isinstance(event, TextDelta):
                yield time.perf_counter()
            elif isinstance(event, Finished):
                return event.answer.usage
        raise Cancelled("The answer ended without its last event.")

    return ask


class HttpDriver:
    """Sends a question as a streamed chat completion. `url` is the server's root or its `/v1`."""

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        """Raises BadParameter if no server answers, or if it lists no model and none is given."""
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise BadParameter(f"{url!r} is not a server address: it must begin with http:// or https://.")
        self._client = open_client(self.url, api_key)
        try:
            self.model = model or str(self._client.get("/v1/models").raise_for_status().json()["data"][0]["id"])
        except httpx.HTTPError as error:
            raise BadParameter(f"No server answers at {self.url}: {error}.") from error
        except (ValueError, LookupError, TypeError) as error:
            raise BadParameter(f"{self.url} lists no model: name one with --served-model.") from error

    def __call__(self, image: bytes, question: str, max_tokens: int) -> Generator[float, None, Usage]:
        """See `workloads.Driver`. Raises RequestFailed."""
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
        usage: dict[str, Any] | None = None
        for arrived, event in streamed(self._client, "/v1/chat/completions", {**body, "guard": False}):
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                delta = choice.get("delta") or {}
                if delta.get("content") or delta.get("reasoning_content"):
                    yield arrived
        if usage is None:
            raise RequestFailed(f"{self.url} did not say how many tokens it answered with.")
        details = usage.get("prompt_tokens_details") or {}
        counts = {name: usage.get(name, 0) for name in ("prompt_tokens", "completion_tokens")}
        return Usage(**counts, **{name: details.get(name) or 0 for name in ("image_tokens", "cached_tokens")})


def open_client(url: str, api_key: str | None = None) -> httpx.Client:
    """Who asks a server. One connection per question: a server may close an idle one just when it is used again."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False, limits=limits)


def streamed(client: httpx.Client, path: str, body: dict[str, Any]) -> Iterator[tuple[float, dict[str, Any]]]:
    """Ask for a greedy answer; its events, each with the `time.perf_counter()` of its coming. Raises RequestFailed."""
    body = {**body, "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    try:
        with client.stream("POST", path, json=body) as response:
            if response.status_code != httpx.codes.OK:
                text = response.read().decode(errors="replace")
                raise RequestFailed(f"status {response.status_code}: {_message(text)}")
            for line in response.iter_lines():
                arrived, data = time.perf_counter(), line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise RequestFailed(_message(data))
                yield arrived, event
    except (httpx.HTTPError, ValueError) as error:
        raise RequestFailed(f"{client.base_url} broke off: {error or type(error).__name__}.") from error


def _message(body: str) -> str:
    """The message of an OpenAI-style error body, or the body's beginning."""
    try:
        return str(json.loads(body)["error"]["message"])[:200]
    except (ValueError, LookupError, TypeError):
        return body[:200]


@contextmanager
def serving(settings: EngineSettings) -> Iterator[tuple[int, str]]:
    """`opsin serve` as a child with these settings alone; its process id and address. Raises BadParameter."""
    flags = as_flags(settings.model_dump(mode="json", exclude_unset=True, exclude_none=True))
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPSIN_")}
    env["XDG_CONFIG_HOME"] = os.devnull
    with tempfile.TemporaryDirectory(prefix="opsin-bench-") as folder, (Path(folder) / "log").open("w+b") as log:
        command = [sys.executable, "-m", "opsin", "serve", *flags]
        with listening("opsin serve", command, "/ready", log, cwd=folder, env=env) as found:
            yield found


@contextmanager
def listening(
    name: str, command: Sequence[str], health: str, log: IO[bytes], seconds: tuple[float, float] = (600, 30), **how: Any
) -> Iterator[tuple[int, str]]:
    """A server as a child on a free port, which is added to `command`; its process id and address, once it is ready.

    It is ready when it answers `health` well, and has `seconds` for that and to end. It writes to `log`; `how` is for
    `Popen`. Raises BadParameter where it does not start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, deadline, ready = f"http://127.0.0.1:{port}", time.monotonic() + seconds[0], False
    command = [*command, "--port", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **how)  # noqa: S603 - ours
    try:
        while not ready:
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise BadParameter(f"{name} did not start: {log.read().decode(errors='replace')[-500:]}")
            time.sleep(0.05)
            with suppress(httpx.HTTPError):
                ready = httpx.get(f"{url}{health}", trust_env=False, timeout=2.0).is_success
        yield process.pid, url
    finally:
        process.terminate()
        try:
            process.wait(seconds[1])
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
