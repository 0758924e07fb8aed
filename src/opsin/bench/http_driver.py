"""Any OpenAI-compatible vision server as a driver."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Generator, Iterable
from typing import Any

import httpx

from opsin.bench.workload import RequestFailed
from opsin.core.answer import Usage
from opsin.core.errors import BadParameter

TIMEOUT_S = 300.0
_PNG = b"\x89PNG"


class HttpDriver:
    """Sends a question as a streamed chat completion, and stamps each piece of text when it arrives.

    `url` is the server's root, or its `/v1`. `now` gives seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Raises BadParameter when nothing answers there, or when it names no model and none is given."""
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise BadParameter(f"{url!r} is no server's address: it begins with http:// or https://.")
        self._now = now
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A connection of its own for each question: a server may close an idle one just as it is used again.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(
            base_url=self.url, headers=headers, timeout=TIMEOUT_S, trust_env=False, limits=limits
        )
        self.model = model or self._first_model()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def ask(self, picture: bytes, question: str, max_tokens: int) -> Generator[float, None, Usage]:
        """See `workload.Driver`. Raises RequestFailed."""
        kind = "png" if picture.startswith(_PNG) else "jpeg"
        url = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "guard": False,
        }
        usage: Usage | None = None
        cut = False
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise RequestFailed(_said(response))
                for chunk in _events(response.iter_lines()):
                    arrived = self._now()
                    usage = _usage(chunk) or usage
                    cut = cut or _cut(chunk)
                    if _text(chunk):
                        yield arrived
        except httpx.HTTPError as error:
            raise RequestFailed(f"{self.url} broke off: {error or type(error).__name__}.") from error
        if usage is None and cut:
            # Some servers count nothing in streams; an answer that its limit ended has as many tokens as that.
            return Usage(completion_tokens=max_tokens)
        if usage is None:
            raise RequestFailed(f"{self.url} did not say how many tokens it answered with.")
        return usage

    def _first_model(self) -> str:
        try:
            response = self._client.get("/v1/models")
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except httpx.HTTPError as error:
            raise BadParameter(f"No server answers at {self.url}: {error}.") from error
        except (ValueError, LookupError, TypeError) as error:
            raise BadParameter(f"{self.url} names no model: give one with --served-model.") from error


def _events(lines: Iterable[str]) -> Generator[dict[str, Any], None, None]:
    """The JSON documents of an event stream; comments and `[DONE]` are passed over."""
    for line in lines:
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if not data or data == "[DONE]":
            continue
        try:
            document = json.loads(data)
        except ValueError as error:
            raise RequestFailed(f"An event is no JSON: {data[:80]!r}.") from error
        if "error" in document:
            raise RequestFailed(_message(document))
        yield document


def _text(chunk: dict[str, Any]) -> bool:
    deltas = [choice.get("delta") or {} for choice in chunk.get("choices") or ()]
    return any(delta.get("content") or delta.get("reasoning_content") for delta in deltas)


def _cut(chunk: dict[str, Any]) -> bool:
    return any(choice.get("finish_reason") == "length" for choice in chunk.get("choices") or ())


def _usage(chunk: dict[str, Any]) -> Usage | None:
    counted = chunk.get("usage")
    if not counted:
        return None
    details = counted.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=counted.get("prompt_tokens", 0),
        completion_tokens=counted.get("completion_tokens", 0),
        image_tokens=details.get("image_tokens") or 0,
        cached_tokens=details.get("cached_tokens") or 0,
    )


def _said(response: httpx.Response) -> str:
    response.read()
    try:
        said = _message(response.json())
    except ValueError:
        said = response.text[:200]
    return f"status {response.status_code}: {said}"


def _message(document: Any) -> str:
    error = document.get("error") if isinstance(document, dict) else None
    return str(error.get("message", error) if isinstance(error, dict) else error or document)[:200]
