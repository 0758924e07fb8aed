"""One line per request, for people or for machines. Never a prompt, an answer, a key, or the address of an image."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from opsin.server.request_stats import RequestStats

NAME = "opsin.access"
_SHARE = 0.01
"""The plain line leaves out stages with a smaller share of the time."""
_LONGEST = 100
"""Characters of text that a client chose."""


class AccessLog:
    """A watcher that writes to the logger `opsin.access`, on standard error if that has no handler yet.

    A plain line shows the main stages of the choice that took longest; JSON has all stages of all choices.
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

    def finished(self, stats: RequestStats) -> None:
        """See Watcher."""
        fields = _fields(stats)
        self._log.info("%s", json.dumps(fields) if self._as_json else _plain(fields))


def _fields(stats: RequestStats) -> dict[str, Any]:
    first = stats.first_token_s
    usages = [answer.usage for answer in stats.answers]
    return {
        "time": datetime.fromtimestamp(stats.began_at, UTC).isoformat(timespec="milliseconds"),
        "id": stats.id,
        "route": _short(stats.route),
        "status": stats.status,
        "refused": stats.refused,
        "model": _short(stats.model),
        "streamed": stats.streamed,
        "images": stats.images,
        "prompt_tokens": max((usage.prompt_tokens for usage in usages), default=0),
        "cached_tokens": max((usage.cached_tokens for usage in usages), default=0),
        "completion_tokens": sum(usage.completion_tokens for usage in usages),
        "first_token_s": None if first is None else round(first, 4),
        "longest_pause_s": round(stats.longest_pause_s, 4),
        "total_s": round(stats.ended - stats.began, 4),
        "answers": [
            {
                "finish_reason": answer.finish_reason,
                "limit": answer.limit,
                "guard": None if answer.guard is None else asdict(answer.guard),
                "stages": answer.stages.as_dict(),
            }
            for answer in stats.answers
        ],
    }


def _plain(fields: dict[str, Any]) -> str:
    words = [fields["time"], fields["id"], fields["route"], str(fields["status"])]
    words += [f"{name}={fields[name]}" for name in ("refused", "model") if fields[name]]
    total, answers = f"total={fields['total_s']:.3f}s", fields["answers"]
    if not answers:
        return " ".join((*words, total))
    words.append(f"tokens={fields['prompt_tokens']}+{fields['completion_tokens']}")
    if fields["first_token_s"] is not None:
        words += [f"ttft={fields['first_token_s']:.3f}s", f"pause={fields['longest_pause_s']:.3f}s"]
    stages = max((answer["stages"] for answer in answers), key=lambda stages: stages["total_ms"])
    least_ms = _SHARE * stages.pop("total_ms")
    words += [total, *(f"{name.removesuffix('_ms')}={ms / 1e3:.3f}s" for name, ms in stages.items() if ms > least_ms)]
    return " ".join((*words, *(f"end={answer['limit'] or answer['finish_reason']}" for answer in answers)))


def _short(text: str) -> str:
    """Text that a client chose, so that it can neither start a new line nor look like another field."""
    return re.sub(r"[^\x21-\x7e]", "?", text)[:_LONGEST]
