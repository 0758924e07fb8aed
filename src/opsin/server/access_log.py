"""One line a request, for people or for machines. Never a prompt, an answer, a key, or the address of a picture."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from opsin.core.answer import Answer
from opsin.server.record import Record

NAME = "opsin.access"
_SHARE = 0.01
"""Stages with a smaller share of the time are left out of the plain line."""
_LONGEST = 100
"""Characters of what a client chose."""


class AccessLog:
    """A watcher that writes to the logger `opsin.access`, on standard error where that has no handler yet.

    A plain line gives the stages of the choice that took longest, as far as they matter; JSON gives all of all.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._log = logging.getLogger(NAME)
        if not self._log.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(message)s"))
            self._log.addHandler(handler)
            self._log.propagate = False
        self._log.setLevel(logging.INFO)

    def finished(self, record: Record) -> None:
        """See Watcher."""
        account = _account(record)
        self._log.info("%s", json.dumps(account) if self._as_json else _plain(account))


def _account(record: Record) -> dict[str, Any]:
    first = record.first_token_s
    usages = [answer.usage for answer in record.answers]
    return {
        "time": datetime.fromtimestamp(record.began_at, timezone.utc).isoformat(timespec="milliseconds"),
        "id": record.id,
        "route": _short(record.route),
        "status": record.status,
        "refused": record.refused,
        "model": _short(record.model),
        "streamed": record.streamed,
        "pictures": record.pictures,
        "prompt_tokens": max((usage.prompt_tokens for usage in usages), default=0),
        "cached_tokens": max((usage.cached_tokens for usage in usages), default=0),
        "completion_tokens": sum(usage.completion_tokens for usage in usages),
        "first_token_s": None if first is None else round(first, 4),
        "longest_pause_s": round(record.longest_pause_s, 4),
        "total_s": round(record.ended - record.began, 4),
        "answers": [_answer(answer) for answer in record.answers],
    }


def _answer(answer: Answer) -> dict[str, Any]:
    return {
        "finish_reason": answer.finish_reason,
        "limit": answer.limit,
        "guard": None if answer.guard is None else asdict(answer.guard),
        "stages": answer.stages.as_dict(),
    }


def _plain(account: dict[str, Any]) -> str:
    words = [account["time"], account["id"], account["route"], str(account["status"])]
    words += [f"{name}={account[name]}" for name in ("refused", "model") if account[name]]
    answers = account["answers"]
    if answers:
        words.append(f"tokens={account['prompt_tokens']}+{account['completion_tokens']}")
        if account["first_token_s"] is not None:
            words += [f"ttft={account['first_token_s']:.3f}s", f"pause={account['longest_pause_s']:.3f}s"]
    words.append(f"total={account['total_s']:.3f}s")
    if answers:
        longest = max(answers, key=lambda answer: answer["stages"]["total_ms"])
        total_ms = longest["stages"]["total_ms"]
        words += [
            f"{name.removesuffix('_ms')}={ms / 1e3:.3f}s"
            for name, ms in longest["stages"].items()
            if name != "total_ms" and ms > _SHARE * total_ms
        ]
        words += [f"end={answer['limit'] or answer['finish_reason']}" for answer in answers]
    return " ".join(words)


def _short(text: str) -> str:
    """What a client chose, so that it can neither begin a new line nor look like another field."""
    return re.sub(r"[^\x21-\x7e]", "?", text)[:_LONGEST]
