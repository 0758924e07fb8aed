"""How much one key may ask."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from opsin.core.server_settings import ServerSettings
from opsin.server.errors import error_response
from opsin.server.pixels import holding_pixels


@dataclass(slots=True)
class _Account:
    """One key's: requests that it may make at once now, as of `at` seconds, and those that run."""

    tokens: float
    at: float
    running: int = 0


class Limits:
    """Middleware around every POST: rate and number of requests of a key, and the pixels held.

    A key may make `requests_per_minute` at once and gets as many back evenly over each minute; more get 429 with
    Retry-After, as do those beyond `concurrent_requests`. Without keys everybody shares one account. `clock` gives
    seconds, and is there for tests.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._rate = settings.requests_per_minute
        self._most = settings.concurrent_requests
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let through, or refuse."""
        if scope["type"] != "http" or scope["method"] in {"GET", "HEAD", "OPTIONS"}:
            await self._app(scope, receive, send)
            return
        account = self._account(scope.get("state", {}).get("key", ""))
        wait, sentence = self._wait(account)
        if wait:
            headers = {"Retry-After": str(wait)}
            await error_response(429, sentence, "rate_limit_exceeded", headers=headers)(scope, receive, send)
            return
        account.running += 1
        try:
            with holding_pixels():
                await self._app(scope, receive, send)
        finally:
            account.running -= 1

    def _account(self, key: str) -> _Account:
        """The account of a key, with what the time that passed has brought it."""
        now = self._clock()
        account = self._accounts.setdefault(key, _Account(float(self._rate or 0), now))
        if self._rate is not None:
            account.tokens = min(self._rate, account.tokens + (now - account.at) * self._rate / 60)
        account.at = now
        return account

    def _wait(self, account: _Account) -> tuple[int, str]:
        """Seconds after which to come back, and why; zero takes one request off the account."""
        if self._most is not None and account.running >= self._most:
            return 1, f"This key has {self._most} requests running, which is the limit; wait until one has ended."
        if self._rate is None:
            return 0, ""
        if account.tokens < 1:
            seconds = math.ceil((1 - account.tokens) * 60 / self._rate)
            return seconds, f"This key may make {self._rate} requests a minute; try again in {seconds} s."
        account.tokens -= 1
        return 0, ""
