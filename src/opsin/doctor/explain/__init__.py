"""Logs of llama.cpp's tools in, causes with their arithmetic out: text → facts → stages → causes.

Refuses to load a model, to measure, and to guess a number that the log does not hold.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from opsin.doctor.explain.facts import Facts, StageRow
from opsin.doctor.explain.parse import parse
from opsin.doctor.explain.rules import Cause, causes_in

_SHARE, _LEAST = 0.05, 0.01  # a cause counts from these shares of the request's time and seconds


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a log says: `causes` by cost, the greatest first; none for a healthy one."""

    facts: Facts
    stages: tuple[StageRow, ...]
    causes: tuple[Cause, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.causes:
            return self.causes[0].message
        if not self.stages:
            return "Nothing in this log is wrong, but it has no times: add those of a request."
        most = max(self.stages, key=lambda row: row.ms)
        return f"Healthy: no known fault; most of the time is {most.name} ({most.ms / 1e3:.2f} s)."

    def as_dict(self) -> dict[str, Any]:
        """The object of `opsin explain --json`."""
        facts, whole = self.facts, round(self.facts.worst.whole / 1e3, 3)
        return {
            "tool": facts.tool,
            "healthy": not self.causes,
            "verdict": self.verdict,
            "request": {"line": facts.worst.line, "position": facts.position, "count": facts.count, "total_s": whole},
            "stages": [{**asdict(row), "ms": round(row.ms, 3)} for row in self.stages],
            "causes": [asdict(cause) for cause in self.causes],
            "notes": list(self.notes),
        }


def explain(stream: BinaryIO) -> Explanation:
    """Read a log and say what it means. OSError when it cannot be read; BadInput when it tells nothing."""
    facts = parse(stream)
    every = list(causes_in(facts))
    found = [cause for cause in every if not cause.symptom]
    found += [one for one in every if one.symptom and not any(_accounts_for(cause, one) for cause in found)]
    least = max(_LEAST, _SHARE * facts.worst.whole / 1e3)
    kept = [cause for cause in found if cause.seconds is None or cause.seconds >= least]
    causes = sorted(kept, key=lambda cause: _weight(cause, kept), reverse=True)
    return Explanation(facts, facts.worst.table(), tuple(causes), tuple(_notes(facts)))


def _weight(cause: Cause, causes: list[Cause]) -> float:
    """The seconds by which causes are ordered: of a bound, what the known costs of the same stage leave."""
    known = sum(other.seconds or 0.0 for other in causes if not other.at_most and _same_stage(cause, other))
    return -1.0 if cause.seconds is None else max(0.0, cause.seconds - known) if cause.at_most else cause.seconds


def _same_stage(cause: Cause, other: Cause) -> bool:
    return cause.where == other.where or "all" in {cause.where, other.where}


def _accounts_for(cause: Cause, symptom: Cause) -> bool:
    """The cause explains the slow stage: it is of that stage, and not the smaller part of it."""
    if not _same_stage(cause, symptom) or cause.name in {"between_tokens", "no_flash_attention"}:
        return False
    return cause.seconds is None or cause.seconds >= 0.5 * (symptom.seconds or 0.0)


def _notes(facts: Facts) -> list[str]:
    worst, notes = facts.worst, []
    if facts.count > 1:
        place = f"request {facts.position} of {facts.count}" if facts.position else f"one of {facts.count} requests"
        notes.append(f"Explained is {place}, the slowest; it begins at line {worst.line}.")
    if worst.before_timer is not None:
        # A log's first prompt can only be cached if a handler has put its image there; a later one may be text.
        what = "Vision" if worst.image or facts.position == 1 else "Image and prompt"
        notes.append(
            f"{what} took at most {worst.before_timer / 1e3:.2f} s: {worst.whole / 1e3:.2f} s by the wall clock − "
            f"{(worst.total_ms or 0) / 1e3:.2f} s of total time, which begins after image and prompt."
        )
    if worst.counts_encoder and worst.prompt_ms:
        notes.append("This tool counts the vision encoder in the prompt's time.")
    again = [max(r.prompt_ms or 0.0, r.image) / 1e3 for r in facts.requests if r.encode_ms][1:]
    if again and facts.tool == "llama-cpp-python" and facts.setup.loads < 2:
        notes.append(
            f"{len(again) + 1} requests encoded an image each, and the handler cleared the memory every time. If they "
            f"ask about one image, a server that keeps it (opsin serve) saves up to {sum(again):.2f} s."
        )
    return notes


def as_text(explanation: Explanation) -> list[str]:
    """The explanation as plain lines, without the table of stages."""
    lines = [f"{explanation.facts.tool}: {explanation.verdict}"]
    for number, cause in enumerate(explanation.causes, start=1):
        cost = "" if cause.seconds is None else f"  {'≤' if cause.at_most else ''}{cause.seconds:.2f} s"
        lines += ["", f"{number}. {cause.name}{cost}", f"   {cause.message}", f"   sum:  {cause.arithmetic}"]
        saves = "" if cause.saves_seconds is None else f" (saves up to {cause.saves_seconds:.1f} s)"
        lines.append(f"   help: {cause.remedy}{saves}")
    return lines + ([""] if explanation.notes else []) + list(explanation.notes)
