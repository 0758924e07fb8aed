"""Do two files belong together, and are they good? Told from their headers; more once they are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from opsin.core.errors import BadPrompt, ModelError, ModelUnreadable, PairMismatch
from opsin.core.model_info import PairFacts
from opsin.core.request import TextPart
from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check, Status, serve_command, worst
from opsin.models import GgufInfo, Pair, check_pair, family_warning, find_projector, info_of
from opsin.models.facts import pair_facts
from opsin.models.gguf import parts_of, read_header, stem
from opsin.models.registry import is_known, look_up
from opsin.prompt import Message, PromptBuilder, TemplateSource
from opsin.prompt.template import choose

# Tokens of a prompt beside its image (system sentence, markers, a question), and of an answer.
_TEXT_TOKENS, _ANSWER_TOKENS = 64, 256
_SMALL_UBATCH = 256
_ANSWER = "It is a red kite."
_UNDER_8_BITS = ("Q2", "Q3", "Q4", "IQ1", "IQ2", "IQ3", "IQ4", "TQ", "MXFP4", "NVFP4", "Q1")


@dataclass(frozen=True, slots=True)
class PairInfo:
    """All that the headers of a pair say; `mismatch`: why the two do not belong together, `doubt`: why they may not."""

    pair: Pair
    llm: GgufInfo
    mmproj: GgufInfo | None
    parts: tuple[Path, ...]
    template: str | None
    facts: PairFacts
    mismatch: str | None = None
    doubt: str | None = None


def read_pair(pair: Pair, settings: EngineSettings | None = None) -> PairInfo:
    """Read both files' headers. Raises ModelNotFound and ModelUnreadable."""
    parts = tuple(parts_of(pair.llm))
    headers = [read_header(part) for part in parts]
    llm, template = info_of(headers), headers[0].text("tokenizer.chat_template")
    image_max_tokens = settings.image_max_tokens if settings else None
    if pair.mmproj is None:
        return PairInfo(pair, llm, None, parts, template, pair_facts(headers, None, image_max_tokens))
    vision = read_header(pair.mmproj)
    mmproj, facts, mismatch = info_of([vision]), pair_facts(headers, vision, image_max_tokens), None
    try:
        check_pair(llm, mmproj)
    except PairMismatch as error:
        mismatch = f"{error}".rstrip(".") + "."
    return PairInfo(pair, llm, mmproj, parts, template, facts, mismatch, family_warning(llm, mmproj))


@dataclass(frozen=True, slots=True)
class LoadedFacts:
    """What the headers do not tell (checks of what is None are left out). `ctx_seq`: tokens one sequence may hold."""

    template: TemplateSource | None = None
    eog_texts: frozenset[str] | None = None
    image_tokens: int | None = None
    causal: bool = True
    ubatch: int = EngineSettings.model_fields["ubatch"].default
    ctx_seq: int | None = None
    settings: EngineSettings = field(default_factory=EngineSettings)

    def command(self, info: PairInfo, *words: object, **update: object) -> str:
        """`opsin serve` with the pair, these settings and some changes."""
        files = {"model": info.llm.path, "mmproj": info.mmproj.path if info.mmproj else None}
        return serve_command(self.settings, *words, **{**files, **update})


def pair_checks(info: PairInfo, facts: LoadedFacts | None = None) -> list[Check]:
    """The checks `pair.*` of a pair's headers and of what else is known of it."""
    facts = facts or LoadedFacts()
    checks = _projector(info, facts)
    projector = info.facts.projector
    tokens = facts.image_tokens or (projector.tokens if projector else None)
    if info.mmproj is not None and worst(checks) != "fail":
        checks.append(_quantisation(info.mmproj))
        checks += [_ubatch(info, facts, tokens)] if tokens else []
        checks += [_context(info, facts, tokens, facts.ctx_seq)] if tokens and facts.ctx_seq else []
    return checks + _template(info, facts)


def _projector(info: PairInfo, facts: LoadedFacts) -> list[Check]:
    """`pair.projector`: is it one, and one for images; `pair.width`: does it produce what the model takes in."""
    llm, mmproj, wrong = info.llm, info.mmproj, info.mismatch
    fix = _get_projector(info, facts) if mmproj is None or wrong is not None else None
    if mmproj is None:
        wrong = f"{llm.path.name} has no projector, so it reads text only: give the mmproj published with it."
        return [Check("pair.projector", "fail", wrong, {"model": str(llm.path)}, fix)]
    kinds = {"projector": str(mmproj.path), "kind": mmproj.projector}
    if wrong is not None and (llm.is_projector or not mmproj.is_projector or not mmproj.has_vision):
        return [Check("pair.projector", "fail", wrong, kinds, fix)]
    widths = {"projector_width": mmproj.projector_width, "model_width": llm.width}
    status: Status = "fail" if wrong else "warn" if info.doubt else "ok"
    message = f"The projector produces {llm.width} values a token, which the model takes in."
    if None in widths.values():
        message = "The widths of projector and model cannot be told from the files: llama.cpp compares them at loading."
    return [
        Check("pair.projector", "ok", f"{mmproj.path.name} is a projector for images.", kinds),
        Check("pair.width", status, wrong or (f"{info.doubt}." if info.doubt else message), widths, fix),
    ]


def _get_projector(info: PairInfo, facts: LoadedFacts) -> str | None:
    """The command with the fitting projector that lies beside the model, or the one that downloads the pair."""
    llm = info.llm
    if llm.is_projector:
        return None
    try:
        beside = find_projector(llm.path)
    except (ModelError, OSError):  # none that fits, or a folder that cannot be listed
        beside = None
    if beside is not None:
        return facts.command(info, mmproj=beside)
    known = next((name for name in (llm.name, stem(llm.path.name)) if name and is_known(name)), None)
    row = look_up(known).known if known else None
    return f"opsin pull {row.name}" if row else None


def _quantisation(mmproj: GgufInfo) -> Check:
    kind = mmproj.quantisation
    status: Status = "warn"
    message = f"{mmproj.path.name} is {kind}: so few bits blur what the encoder sees; take its q8_0 or f16 file."
    if mmproj.is_all_f32:
        message = f"All of {mmproj.path.name} is f32, twice the memory and time of f16: convert it with --outtype f16."
    elif not kind.startswith(_UNDER_8_BITS):
        status, message = "ok", f"The projector is {kind}."
    return Check("pair.quantisation", status, message, {"quantisation": kind})


def _ubatch(info: PairInfo, facts: LoadedFacts, tokens: int) -> Check:
    """An image that attends in both directions must go in one ubatch; small ones read all weights many times."""
    evidence = {"image_tokens": tokens, "ubatch_tokens": facts.ubatch, "causal": facts.causal}
    slices, larger = -(-tokens // facts.ubatch), _padded(tokens, 256)
    message = f"An image's {tokens} tokens go in {slices} ubatches of {facts.ubatch}"
    if slices == 1 or (facts.causal and facts.ubatch >= _SMALL_UBATCH):
        return Check("pair.ubatch", "ok", f"{message}.", evidence)
    if not facts.causal:
        message = f"An image's {tokens} tokens must go in one ubatch, which holds {facts.ubatch}"
    fix = facts.command(info, ubatch=larger)
    status: Status = "warn" if facts.causal else "fail"
    return Check("pair.ubatch", status, f"{message}: give --ubatch {larger}.", evidence, fix)


def _context(info: PairInfo, facts: LoadedFacts, tokens: int, ctx: int) -> Check:
    name, trained, least = "pair.context", info.llm.context, tokens + _TEXT_TOKENS
    evidence = {"image_tokens": tokens, "context_tokens": ctx, "trained_context_tokens": trained}
    need = _padded(least + 4 * _ANSWER_TOKENS, 1024)
    status: Status = "warn"
    if trained is not None and trained < least:
        message = f"One image's {tokens} tokens exceed what the model was trained on: give fewer --image-max-tokens."
        return Check(name, "fail", message, evidence)
    if ctx < least:
        status, message = "fail", f"One image's {tokens} tokens and a question do not fit the context of {ctx} tokens"
    elif ctx < least + _ANSWER_TOKENS:
        message = f"An image of {tokens} tokens leaves {ctx - least} of {ctx} for the answer, which will be cut"
    elif trained is not None and ctx > trained:
        message = f"The context of {ctx} tokens is longer than the trained {trained}: answers behind that are nonsense"
        need = trained
    else:
        return Check(name, "ok", f"The context of {ctx} tokens holds an image, a question and an answer.", evidence)
    total = min(need, trained or need) * facts.settings.parallel
    return Check(name, status, f"{message}; give --ctx {total}.", evidence, facts.command(info, ctx=total))


def _template(info: PairInfo, facts: LoadedFacts) -> list[Check]:
    """`pair.template`: is there one that can be used; `pair.end`: does it end an answer as the model does."""
    source = facts.template or _source_by_header(info)
    missing = not (source.template or "").strip()
    # Which one stands in depends on the control tokens, which only the loaded model tells.
    built_in = choose(source) if missing and facts.template is not None else None
    evidence = {"characters": len(source.template or ""), "built_in": built_in}
    try:
        builder = PromptBuilder(source)
        talk = [Message("user", "What is this?"), Message("assistant", _ANSWER)]
        builder.build(talk[:1])
        prompt = builder.build(talk, add_generation_prompt=False)
    except (BadPrompt, ModelUnreadable) as error:
        return [Check("pair.template", "fail", f"{error}", evidence)]
    status: Status = "warn" if missing else "ok"
    which = f"a built-in one called {built_in} is" if built_in else "a built-in one is"
    odd = f"ships no chat template, so {which} used: if answers are odd, take a newer file."
    message = f"{info.llm.path.name} {odd if missing else 'has a chat template.'}"
    checks = [Check("pair.template", status, message, evidence)]
    # Models that read pages take one bare instruction: nothing is written behind an answer.
    if facts.template is None or facts.eog_texts is None or built_in == "plain":
        return checks
    rendered = "".join(part.text for part in prompt.parts if isinstance(part, TextPart))
    tail, ends = rendered.partition(_ANSWER)[2], sorted(text for text in facts.eog_texts if text)
    written = next((text for text in (*ends, *prompt.stop) if text in tail), None)
    told = {"after_answer": tail, "end_tokens": ends, "stop_strings": list(prompt.stop)}
    if written:
        return [*checks, Check("pair.end", "ok", f"The template ends an answer with {written!r}.", told)]
    message = (
        f"The template writes {tail!r} behind an answer and none of the end tokens ({', '.join(ends) or 'none'}), so "
        "answers may not end by themselves: take a newer GGUF file, or set --max-tokens."
    )
    fix = facts.command(info, "--max-tokens", _ANSWER_TOKENS)
    return [*checks, Check("pair.end", "warn", message, told, fix)]


def _source_by_header(info: PairInfo) -> TemplateSource:
    """Enough to see whether the file's template can be used."""
    name, projector = f"{info.llm.name or ''} {info.llm.path.name}", info.mmproj.projector if info.mmproj else None
    return TemplateSource(info.template, info.llm.architecture, name, projector, "", "", frozenset())


def _padded(tokens: int, step: int) -> int:
    return -(-tokens // step) * step
