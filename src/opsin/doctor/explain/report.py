"""Facts in, explanation out: causes by their cost, the table of stages, and both as text and as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

from opsin.doctor.explain import rules_place, rules_time
from opsin.doctor.explain.cause import Cause
from opsin.doctor.explain.gather import Facts, gather
from opsin.doctor.explain.stages import StageRow, stage_table

_SHARE, _LEAST = 0.05, 0.01
"""A cause counts from five hundredths of the request's time and a hundredth of a second."""


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
        return f"Healthy: no known fault; most of the time is {most.name} ({most.seconds:.2f} s)."

    def as_dict(self) -> dict[str, Any]:
        """The object of `opsin explain --json`."""
        worst = self.facts.worst
        return {
            "tool": self.facts.tool,
            "healthy": not self.causes,
            "verdict": self.verdict,
            "request": {
                "line": worst.line,
                "position": self.facts.position,
                "count": self.facts.count,
                "total_s": round(worst.whole / 1e3, 3),
            },
            "stages": [
                {"name": row.name, "ms": round(row.ms, 3), "at_most": row.at_most, "note": row.note}
                for row in self.stages
            ],
            "causes": [cause.as_dict() for cause in self.causes],
            "notes": list(self.notes),
        }


def explain(stream: BinaryIO) -> Explanation:
    """Read a log and say what it means. OSError when it cannot be read; BadInput when it tells nothing."""
    facts = gather(stream)
    found = [cause for rule in (*rules_place.RULES, *rules_time.RULES) if (cause := rule(facts))]
    symptoms = [cause for rule in rules_time.SYMPTOMS if (cause := rule(facts))]
    found += [symptom for symptom in symptoms if not any(_accounts_for(cause, symptom) for cause in found)]
    least = max(_LEAST, _SHARE * facts.worst.whole / 1e3)
    causes = [cause for cause in found if cause.seconds is None or cause.seconds >= least]
    causes.sort(key=lambda cause: -1.0 if cause.seconds is None else cause.seconds, reverse=True)
    return Explanation(facts, stage_table(facts.worst), tuple(causes), tuple(_notes(facts)))


def _accounts_for(cause: Cause, symptom: Cause) -> bool:
    """The cause explains the slow stage: it is of that stage, and not the smaller part of it."""
    if (cause.where not in {symptom.where, "all"} and symptom.where != "all") or cause.name == "between_tokens":
        return False
    return cause.seconds is None or cause.seconds >= 0.5 * (symptom.seconds or 0.0)


def _notes(facts: Facts) -> list[str]:
    worst, notes = facts.worst, []
    if facts.count > 1:
        place = f"request {facts.position} of {facts.count}" if facts.position else f"one of {facts.count} requests"
        notes.append(f"Explained is {place}, the slowest; it begins at line {worst.line}.")
    if worst.before_timer is not None and worst.wall_ms is not None and worst.total_ms is not None:
        notes.append(
            f"Vision took at most {worst.before_timer / 1e3:.2f} s: {worst.wall_ms / 1e3:.2f} s by the wall clock − "
            f"{worst.total_ms / 1e3:.2f} s of total time, which begins after picture and prompt."
        )
    if worst.timer in {"server", "ollama"} and not worst.image and worst.prompt_ms:
        notes.append("This tool counts the vision encoder in the prompt's time.")
    return notes


def as_text(explanation: Explanation) -> list[str]:
    """The explanation as plain lines, without the table of stages."""
    facts = explanation.facts
    lines = [f"{facts.tool}: {explanation.verdict}"]
    for number, cause in enumerate(explanation.causes, start=1):
        cost = "" if cause.seconds is None else f"  {cause.seconds:.2f} s"
        lines += ["", f"{number}. {cause.name}{cost}", f"   {cause.message}", f"   sum:  {cause.arithmetic}"]
        saves = "" if cause.saves_seconds is None else f" (saves up to {cause.saves_seconds:.1f} s)"
        lines.append(f"   help: {cause.remedy}{saves}")
    return lines + ([""] if explanation.notes else []) + list(explanation.notes)
