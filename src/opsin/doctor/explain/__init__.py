"""Logs of llama.cpp's tools in, causes with their arithmetic out: text → facts → stages → causes.

Refuses to load a model, to measure, and to guess a number that the log does not hold.
"""

from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from opsin.doctor.explain.facts import Facts, StageRow
from opsin.doctor.explain.finders import FLOORS, LIMITS
from opsin.doctor.explain.parse import parse
from opsin.doctor.explain.rules import Cause, causes_in

_SHARE, _LEAST = 0.05, 0.01  # a cause counts from these shares of the request's time and seconds
_CACHED = 50.0  # tokens in a millisecond, which no prompt reaches that is really processed


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
        worst = self.facts.worst
        if not self.stages:
            known = f" {worst.progress:.0%} of the prompt was processed when it ends." if worst.progress else ""
            return f"No data: no known fault, and no times.{known} Add those of a request."
        if not worst.timed:
            load = f" and of loading ({worst.loading / 1e3:.2f} s)" if worst.loading else ""
            return f"No data: the log has the time of a whole request ({worst.whole / 1e3:.2f} s){load}, of no stage."
        most = self.slow or max(self.stages, key=lambda row: row.ms)
        told = f"{most.name} ({most.ms / 1e3:.2f} of {worst.whole / 1e3:.2f} s{f', {most.note}' * bool(most.note)})"
        if self.slow:
            how = "dominates" if most.ms >= max(row.ms for row in self.stages) else "stands out"
            return f"No known cause; this stage {how}: {told}."
        if line := self.facts.setup.warning_line:
            return f"No known cause, but a warning in line {line}; most of the time is {told}."
        return f"Healthy: no known fault; most of the time is {told}."

    @property
    def slow(self) -> StageRow | None:
        """The longest stage that is slow by itself, whatever the others take."""
        return max((row for row in self.stages if self._is_slow(row)), key=lambda row: row.ms, default=None)

    def _is_slow(self, row: StageRow) -> bool:
        worst = self.facts.worst
        if row.name == "decode" and worst.answer_n > 1 and worst.answer_n / row.ms * 1e3 < LIMITS.least_decode:
            return row.ms >= 1000.0
        each = max(1, len(worst.encode_ms)) if row.name == "vision encode" else 1
        return row.ms >= each * FLOORS.get(row.name.partition(" (")[0], FLOORS["other"])

    def as_dict(self) -> dict[str, Any]:
        """The object of `opsin explain --json`."""
        facts, whole = self.facts, round(self.facts.worst.whole / 1e3, 3)
        return {
            "tool": facts.tool,
            "healthy": self.verdict.startswith("Healthy"),
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
    stages = facts.worst.table(facts.setup.vision)
    return Explanation(facts, stages, tuple(causes), tuple(_notes(facts, stages, causes)))


def _weight(cause: Cause, causes: list[Cause]) -> float:
    """The seconds by which causes are ordered: of a bound, what the known costs of the same stage leave."""
    known = sum(other.seconds or 0.0 for other in causes if not other.at_most and _same_stage(cause, other))
    return -1.0 if cause.seconds is None else max(0.0, cause.seconds - known) if cause.at_most else cause.seconds


def _same_stage(cause: Cause, other: Cause) -> bool:
    return cause.where == other.where or "all" in {cause.where, other.where}


def _accounts_for(cause: Cause, symptom: Cause) -> bool:
    """The cause explains the slow stage: it is of that stage, and not the smaller part of it."""
    if cause.aside or not _same_stage(cause, symptom) or cause.name in {"between_tokens", "no_flash_attention"}:
        return False
    return cause.seconds is None or cause.seconds >= 0.5 * (symptom.seconds or 0.0)


def _notes(facts: Facts, stages: tuple[StageRow, ...], causes: list[Cause]) -> list[str]:
    """What helps to read the numbers: which request they are of, and what the timers count."""
    worst, notes = facts.worst, []
    if facts.count > 1:
        place = f"request {facts.position} of {facts.count}" if facts.position else f"one of {facts.count} requests"
        notes.append(f"Explained is {place}, the slowest; it begins at line {worst.line}.")
    if {"ollama"} < {r.timer for r in facts.requests if r.timer}:
        notes.append(f"The file has requests of Ollama and of another tool: the one explained is {facts.tool}'s.")
    if worst.before_timer is not None:
        # A log's first prompt can only be cached if a handler has put its image there; a later one may be text.
        what = "Vision" if worst.image or facts.position == 1 else "Image and prompt"
        notes.append(
            f"{what} took at most {worst.before_timer / 1e3:.2f} s: {worst.whole / 1e3:.2f} s by the wall clock − "
            f"{(worst.total_ms or 0) / 1e3:.2f} s of total time, which begins after image and prompt."
        )
    if worst.unfinished:
        notes.append("The log ends before the request does: times and tokens are those of its lines of progress.")
    if causes and stages and worst.timed and worst.whole > 0:
        most = max(stages, key=lambda row: row.ms)
        notes.append(f"Most of the time is {most.name}: {most.ms / 1e3:.2f} s, {most.ms / worst.whole:.0%}.")
    if facts.setup.vision and worst.counts_encoder and worst.prompt_ms:
        notes.append("This tool counts the vision encoder in the prompt's time.")
    return notes + _events(facts, causes)


def _events(facts: Facts, causes: list[Cause]) -> list[str]:
    """What happened that costs nothing, or that the log does not tell the cost of."""
    worst, notes = facts.worst, []
    if worst.reprocessed and worst.prompt_ms and "no_prefix_reuse" not in {cause.name for cause in causes}:
        notes.append(f"A cached prompt was processed again, which took {worst.prompt_ms / 1e3:.2f} s: little.")
    if (worst.prompt_n or 0) > _CACHED * (worst.prompt_ms or worst.whole):
        notes.append("The tool counts cached tokens of the prompt, too: fewer were processed in this time.")
    if facts.setup.client_gone:
        notes.append("The client closed the connection before its answer was complete: it did not wait so long.")
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
        message = [] if number == 1 else [f"   {cause.message}"]  # the first is the headline
        lines += ["", f"{number}. {cause.name}{cost}", *message, f"   sum:  {cause.arithmetic}"]
        saves = "" if cause.saves_seconds is None else f" (saves up to {cause.saves_seconds:.1f} s)"
        lines.append(f"   help: {cause.remedy}{saves}")
    return lines + ([""] if explanation.notes else []) + list(explanation.notes)
