"""Do two files belong together, and are they good? Told from what they say of themselves; fuller once loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opsin.core.errors import BadPrompt, ModelError, ModelUnreadable, PairMismatch
from opsin.core.model_facts import PairFacts
from opsin.core.parts import TextPart
from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check, serve_command, shell_line
from opsin.models import GgufInfo, Pair, check_pair, find_projector, read_info
from opsin.models.facts import pair_facts
from opsin.models.gguf import read_header
from opsin.models.naming import parts_of, stem
from opsin.models.registry import is_known, look_up
from opsin.prompt import Message, PromptBuilder, TemplateSource
from opsin.prompt.builtin import choose

# Tokens of a prompt beside its image (system sentence, markers, a question), and of an answer.
_TEXT_TOKENS, _ANSWER_TOKENS = 64, 256
_SMALL_UBATCH = 256
_ANSWER = "It is a red kite."
_UNDER_8_BITS = ("Q2", "Q3", "Q4", "IQ1", "IQ2", "IQ3", "IQ4", "TQ", "MXFP4", "NVFP4", "Q1")


@dataclass(frozen=True, slots=True)
class PairInfo:
    """All that the headers of a pair say, read once.

    `parts` are the files of the language model, `template` is the chat template that it ships, `facts` are the sizes
    that memory depends on. `mismatch` is the sentence on why the two do not belong together, None where they do.
    """

    llm: GgufInfo
    mmproj: GgufInfo | None
    parts: tuple[Path, ...]
    template: str | None
    facts: PairFacts
    mismatch: str | None = None


def read_pair(pair: Pair, settings: EngineSettings | None = None) -> PairInfo:
    """Read both files' headers. Raises ModelNotFound and ModelUnreadable."""
    parts = tuple(parts_of(pair.llm))
    headers = [read_header(part) for part in parts]
    mismatch = None
    if pair.mmproj is None:
        llm, mmproj, vision = read_info(pair.llm), None, None
    else:
        vision = read_header(pair.mmproj)
        try:
            llm, mmproj = check_pair(pair.llm, pair.mmproj)
        except PairMismatch as error:
            mismatch = f"{error}".rstrip(".") + "."
            llm, mmproj = read_info(pair.llm), read_info(pair.mmproj)
    facts = pair_facts(headers, vision, settings.image_max_tokens if settings else None)
    return PairInfo(llm, mmproj, parts, headers[0].text("tokenizer.chat_template"), facts, mismatch)


@dataclass(frozen=True, slots=True)
class LoadedFacts:
    """What the files' headers do not tell; what is None is not known, and its checks are left out.

    `template` is what the prompt room needs of the loaded model, `eog_texts` are the texts of its tokens that end a
    turn. `image_tokens` are those of one image, `causal` is False where an image attends in both directions.
    `ctx_seq` is what one sequence may hold in tokens, `ubatch` the physical batch in tokens. `on_cpu` says that the
    encoder runs on the CPU. `settings` are what commands that fix something start from.
    """

    template: TemplateSource | None = None
    eog_texts: frozenset[str] | None = None
    image_tokens: int | None = None
    causal: bool = True
    ubatch: int = EngineSettings.model_fields["ubatch"].default
    ctx_seq: int | None = None
    on_cpu: bool = True
    settings: EngineSettings = field(default_factory=EngineSettings)

    def command(self, info: PairInfo, *words: object, **update: object) -> str:
        """`opsin serve` with the pair, these settings and some changes."""
        files = {"model": info.llm.path, "mmproj": info.mmproj.path if info.mmproj else None}
        return serve_command(self.settings, *words, **{**files, **update})


def pair_checks(info: PairInfo, facts: LoadedFacts | None = None) -> list[Check]:
    """The checks `pair.*` of a pair's headers and of what else is known of it.

    With the headers alone: projector, width, quantisation, ubatch, and whether there is a chat template.
    """
    facts = facts or LoadedFacts()
    checks = _projector(info, facts)
    if info.mmproj is not None and checks[-1].status == "ok":
        checks.append(_quantisation(info.mmproj, on_cpu=facts.on_cpu))
        checks += _image(info, facts)
    if facts.ctx_seq is not None and info.llm.context is not None:
        checks.append(_trained_context(info, facts, facts.ctx_seq, info.llm.context))
    return checks + _template(info, facts)


def _projector(info: PairInfo, facts: LoadedFacts) -> list[Check]:
    """`pair.projector`: is it one, and one for images; `pair.width`: does it hand over what the model takes in."""
    llm, mmproj, wrong = info.llm, info.mmproj, info.mismatch
    fix = _get_projector(info, facts) if mmproj is None or wrong is not None else None
    if mmproj is None:
        message = (
            f"{llm.path.name} has no projector, so it reads text only: give the mmproj file that was published with it."
        )
        return [Check("pair.projector", "fail", message, {"model": str(llm.path)}, fix)]
    kinds = {"projector": str(mmproj.path), "kind": mmproj.projector}
    widths = {"projector_width": mmproj.projector_width, "model_width": llm.width}
    if wrong is not None and (llm.is_projector or not mmproj.is_projector or not mmproj.has_vision):
        return [Check("pair.projector", "fail", wrong, kinds, fix)]
    checks = [Check("pair.projector", "ok", f"{mmproj.path.name} is a projector for images.", kinds)]
    if wrong is not None:
        return [*checks, Check("pair.width", "fail", wrong, widths, fix)]
    message = f"The projector hands over {llm.width} values a token, which the model takes in."
    if None in widths.values():
        message = "The widths of projector and model cannot be told from the files: llama.cpp compares them at loading."
    return [*checks, Check("pair.width", "ok", message, widths)]


def _get_projector(info: PairInfo, facts: LoadedFacts) -> str | None:
    """The command with the projector that lies beside the model and fits, or the one that downloads the pair."""
    llm = info.llm
    if llm.is_projector:
        return None
    try:
        beside = find_projector(llm.path)
    except (ModelError, OSError):  # one that does not fit, or a folder that cannot be listed
        beside = None
    if beside is not None:
        return facts.command(info, mmproj=beside)
    known = next((name for name in (llm.name, stem(llm.path.name)) if name and is_known(name)), None)
    row = look_up(known).known if known else None
    return shell_line(["opsin", "pull", row.name]) if row else None


def _quantisation(mmproj: GgufInfo, *, on_cpu: bool) -> Check:
    name, kind = "pair.quantisation", mmproj.quantisation
    evidence = {"quantisation": kind, "tensor_types": dict(mmproj.tensor_types)}
    if mmproj.is_all_f32:
        message = (
            f"All of {mmproj.path.name} is f32: twice the memory and time of f16 for the same embeddings, and some "
            "llama.cpp builds crash on it on the CPU; take the f16 file, or convert the model with --outtype f16."
        )
        return Check(name, "warn", message, evidence)
    if kind.startswith(_UNDER_8_BITS):
        message = (
            f"{mmproj.path.name} is {kind}: so few bits blur what the encoder sees and save little; "
            "take its q8_0, bf16 or f16 file."
        )
        return Check(name, "warn", message, evidence)
    if on_cpu and kind == "F16":
        message = "The projector is f16, which is exact; on some CPUs a bf16 or q8_0 one is faster, as measuring tells."
        return Check(name, "ok", message, evidence)
    return Check(name, "ok", f"The projector is {kind}.", evidence)


def _image(info: PairInfo, facts: LoadedFacts) -> list[Check]:
    projector = info.facts.projector
    tokens = facts.image_tokens or (projector.tokens if projector else None)
    if tokens is None:
        return []
    checks = [_ubatch(info, facts, tokens)]
    if facts.ctx_seq is not None:
        checks.append(_context(info, facts, tokens, facts.ctx_seq))
    return checks


def _ubatch(info: PairInfo, facts: LoadedFacts, tokens: int) -> Check:
    name, evidence = "pair.ubatch", {"image_tokens": tokens, "ubatch_tokens": facts.ubatch, "causal": facts.causal}
    if tokens <= facts.ubatch:
        return Check(name, "ok", f"An image's {tokens} tokens go in one ubatch of {facts.ubatch}.", evidence)
    fix = facts.command(info, ubatch=_padded(tokens, 256))
    if not facts.causal:
        message = (
            f"An image's {tokens} tokens attend in both directions and must go in one ubatch, "
            f"which holds {facts.ubatch}: give --ubatch {_padded(tokens, 256)}."
        )
        return Check(name, "fail", message, evidence, fix)
    slices = -(-tokens // facts.ubatch)
    if facts.ubatch < _SMALL_UBATCH:
        message = (
            f"An image's {tokens} tokens go in {slices} slices of {facts.ubatch}, each of which reads all weights: "
            f"give a larger --ubatch, such as {_padded(tokens, 256)}."
        )
        return Check(name, "warn", message, evidence, fix)
    return Check(name, "ok", f"An image's {tokens} tokens go in {slices} slices of {facts.ubatch}.", evidence)


def _context(info: PairInfo, facts: LoadedFacts, tokens: int, ctx: int) -> Check:
    name, trained = "pair.context", info.llm.context
    evidence = {"image_tokens": tokens, "context_tokens": ctx, "trained_context_tokens": trained}
    if tokens + _TEXT_TOKENS + _ANSWER_TOKENS <= ctx:
        images = (ctx - _TEXT_TOKENS - _ANSWER_TOKENS) // tokens
        return Check(name, "ok", f"The context of {ctx} tokens holds {images} images and an answer.", evidence)
    need = _padded(tokens + _TEXT_TOKENS + 4 * _ANSWER_TOKENS, 1024)
    if trained is not None and need > trained >= tokens + _TEXT_TOKENS:
        need = trained
    total = need * facts.settings.parallel
    fix: str | None = facts.command(info, ctx=total)
    mend = f"give --ctx {total}"
    if trained is not None and trained < tokens + _TEXT_TOKENS:
        fix, mend = None, f"its language model was trained on {trained} only, so give fewer --image-max-tokens"
    if tokens + _TEXT_TOKENS > ctx:
        message = f"One image's {tokens} tokens and a question do not fit the context of {ctx} tokens: {mend}."
        return Check(name, "fail", message, evidence, fix)
    left = ctx - tokens - _TEXT_TOKENS
    message = f"An image of {tokens} tokens leaves {left} of {ctx} for the answer, which will be cut: {mend}."
    return Check(name, "warn", message, evidence, fix)


def _trained_context(info: PairInfo, facts: LoadedFacts, ctx: int, trained: int) -> Check:
    name, evidence = "pair.trained_context", {"context_tokens": ctx, "trained_context_tokens": trained}
    if ctx <= trained:
        message = f"The context of {ctx} tokens is within the {trained} that the model was trained on."
        return Check(name, "ok", message, evidence)
    total = trained * facts.settings.parallel
    message = (
        f"The context of {ctx} tokens is longer than the {trained} that the model was trained on: "
        f"answers behind that are nonsense; give --ctx {total}."
    )
    return Check(name, "warn", message, evidence, facts.command(info, ctx=total))


def _template(info: PairInfo, facts: LoadedFacts) -> list[Check]:
    """`pair.template`: is there one that can be used; `pair.end`: does it end an answer as the model does."""
    source = facts.template or _source_by_header(info)
    missing = not (source.template or "").strip()
    # Which one stands in depends on the control tokens, which only the loaded model tells.
    built_in = choose(source).name if missing and facts.template is not None else None
    evidence = {"characters": len(source.template or ""), "built_in": built_in}
    try:
        builder = PromptBuilder(source)
        talk = [Message("user", "What is this?"), Message("assistant", _ANSWER)]
        builder.build(talk[:1])
        prompt = builder.build(talk, add_generation_prompt=False)
    except (BadPrompt, ModelUnreadable) as error:
        return [Check("pair.template", "fail", f"{error}", evidence)]
    checks = [_found_template(info.llm, evidence, missing=missing)]
    # Models that read pages take one bare instruction: nothing is written behind an answer, and they end by themselves.
    if facts.template is None or facts.eog_texts is None or built_in == "plain":
        return checks
    rendered = "".join(part.text for part in prompt.parts if isinstance(part, TextPart))
    return [*checks, _end(info, facts, rendered.partition(_ANSWER)[2], prompt.stop)]


def _source_by_header(info: PairInfo) -> TemplateSource:
    """Enough to see whether the file's template can be used."""
    return TemplateSource(
        template=info.template,
        architecture=info.llm.architecture,
        name=f"{info.llm.name or ''} {info.llm.path.name}",
        projector=info.mmproj.projector if info.mmproj is not None else None,
        bos_token="",
        eos_token="",
        control_tokens=frozenset(),
    )


def _found_template(llm: GgufInfo, evidence: Mapping[str, object], *, missing: bool) -> Check:
    if not missing:
        return Check("pair.template", "ok", f"{llm.path.name} has a chat template.", evidence)
    which = f"the built-in one called {evidence['built_in']} is" if evidence["built_in"] else "a built-in one is"
    message = (
        f"{llm.path.name} ships no chat template, so {which} used, chosen by name and architecture: if answers are "
        "odd, take a newer GGUF file of this model."
    )
    return Check("pair.template", "warn", message, evidence)


def _end(info: PairInfo, facts: LoadedFacts, tail: str, stop: Sequence[str]) -> Check:
    name, ends = "pair.end", sorted(text for text in facts.eog_texts or () if text)
    written = [text for text in (*ends, *stop) if text in tail]
    evidence = {"after_answer": tail, "end_tokens": ends, "stop_strings": list(stop)}
    if written:
        return Check(name, "ok", f"The template ends an answer with {written[0]!r}, which ends it here too.", evidence)
    message = (
        f"The template writes {tail!r} behind an answer and none of the tokens that end one "
        f"({', '.join(ends) or 'the model has none'}), so answers may not end by themselves: take a newer GGUF file of "
        f"{info.llm.path.name}; until then a smaller --max-tokens bounds them."
    )
    return Check(name, "warn", message, evidence, facts.command(info, "--max-tokens", _ANSWER_TOKENS))


def _padded(tokens: int, step: int) -> int:
    return -(-tokens // step) * step
