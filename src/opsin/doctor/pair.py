"""Do two files belong together, and are they good? Told from their headers; more once they are loaded."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from opsin.core.errors import BadPrompt, ModelError, ModelUnreadable, PairMismatch
from opsin.core.model_info import PairFacts
from opsin.core.request import TextPart
from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check, Status, serve_command, worst
from opsin.models import Pair
from opsin.models.facts import pair_facts
from opsin.models.gguf import GgufInfo, info_of, parts_of, read_header, stem
from opsin.models.pairing import check_pair, family_warning, find_projector
from opsin.models.registry import is_known, look_up
from opsin.prompt import Message, PromptBuilder, TemplateSource
from opsin.prompt.template import choose

# Tokens of a prompt beside its image (system sentence, markers, a question), and of an answer.
_TEXT_TOKENS, _ANSWER_TOKENS = 64, 256
_SMALL_UBATCH = 256
_ANSWER = "It is a red kite."
_TALK = [Message("user", "What is this?"), Message("assistant", _ANSWER)]
_UNDER_8_BITS = ("Q2", "Q3", "Q4", "IQ1", "IQ2", "IQ3", "IQ4", "TQ", "MXFP4", "NVFP4", "Q1")


@dataclass(frozen=True, slots=True)
class PairInfo:
    """All that the headers of a pair say; `mismatch`: why the two do not belong together, `doubt`: why they may not.

    `source` is enough to see whether the file's template can be used; its tokens are told by the loaded model alone.
    """

    pair: Pair
    llm: GgufInfo
    mmproj: GgufInfo | None
    parts: tuple[Path, ...]
    source: TemplateSource
    facts: PairFacts
    mismatch: str | None = None
    doubt: str | None = None


def read_pair(pair: Pair, image_max_tokens: int | None = None) -> PairInfo:
    """Read both files' headers. Raises ModelNotFound and ModelUnreadable."""
    parts = tuple(parts_of(pair.llm))
    headers = [read_header(part) for part in parts]
    vision = None if pair.mmproj is None else read_header(pair.mmproj)
    llm, mmproj = info_of(headers), None if vision is None else info_of([vision])
    mismatch = doubt = None
    if mmproj is not None:
        doubt = family_warning(llm, mmproj)
        try:
            check_pair(llm, mmproj)
        except PairMismatch as error:
            mismatch = f"{error}".rstrip(".") + "."
    template, name = headers[0].text("tokenizer.chat_template"), f"{llm.name or ''} {llm.path.name}"
    source = TemplateSource(template, llm.architecture, name, mmproj.projector if mmproj else None, "", "", frozenset())
    return PairInfo(pair, llm, mmproj, parts, source, pair_facts(headers, vision, image_max_tokens), mismatch, doubt)


def header_checks(info: PairInfo, settings: EngineSettings) -> list[Check]:
    """The checks `pair.*` that the headers allow; `settings` name the pair's files."""
    checks = _projector(info, settings)
    if info.mmproj is not None and worst(checks) != "fail":
        checks.append(_quantisation(info.mmproj))
    return [*checks, _template(info)]


def _projector(info: PairInfo, settings: EngineSettings) -> list[Check]:
    """`pair.projector`: is it one, and one for images; `pair.width`: does it produce what the model takes in."""
    llm, mmproj, wrong = info.llm, info.mmproj, info.mismatch
    fix = _get_projector(info.llm, settings) if mmproj is None or wrong is not None else None
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


def _get_projector(llm: GgufInfo, settings: EngineSettings) -> str | None:
    """The command with the fitting projector that lies beside the model, or the one that downloads the pair."""
    if llm.is_projector:
        return None
    with suppress(ModelError, OSError):  # none that fits, or a folder that cannot be listed
        if beside := find_projector(llm.path):
            return serve_command(settings, mmproj=beside)
    known = next((name for name in (llm.name, stem(llm.path.name)) if name and is_known(name)), None)
    return f"opsin pull {look_up(known).name}" if known else None


def _quantisation(mmproj: GgufInfo) -> Check:
    kind = mmproj.quantisation
    status: Status = "warn"
    message = f"{mmproj.path.name} is {kind}: so few bits blur what the encoder sees; take its q8_0 or f16 file."
    if mmproj.is_all_f32:
        message = f"All of {mmproj.path.name} is f32, twice the memory and time of f16: convert it with --outtype f16."
    elif not kind.startswith(_UNDER_8_BITS):
        status, message = "ok", f"The projector is {kind}."
    return Check("pair.quantisation", status, message, {"quantisation": kind})


def ubatch_check(tokens: int, ubatch: int, settings: EngineSettings) -> Check:
    """Small ubatches read all weights many times; for images that must go in one, loading takes a larger ubatch.

    `tokens` are those of a common image.
    """
    evidence = {"image_tokens": tokens, "ubatch_tokens": ubatch}
    slices, larger = -(-tokens // ubatch), -(-tokens // 256) * 256
    message = f"An image's {tokens} tokens go in {slices} ubatches of {ubatch}"
    if slices == 1 or ubatch >= _SMALL_UBATCH:
        return Check("pair.ubatch", "ok", f"{message}.", evidence)
    fix = serve_command(settings, ubatch=larger)
    return Check("pair.ubatch", "warn", f"{message}: give --ubatch {larger}.", evidence, fix)


def context_check(tokens: int, ctx: int, trained: int | None, settings: EngineSettings) -> Check:
    """Does the context of one sequence hold an image's tokens, a question and an answer?"""
    name, least = "pair.context", tokens + _TEXT_TOKENS
    evidence = {"image_tokens": tokens, "context_tokens": ctx, "trained_context_tokens": trained}
    need = -(-(least + 4 * _ANSWER_TOKENS) // 1024) * 1024
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
    total = min(need, trained or need) * settings.parallel
    return Check(name, status, f"{message}; give --ctx {total}.", evidence, serve_command(settings, ctx=total))


def _template(info: PairInfo) -> Check:
    text = (info.source.template or "").strip()
    evidence = {"characters": len(text)}
    try:
        builder = PromptBuilder(info.source)
        builder.build(_TALK[:1])
        builder.build(_TALK, add_generation_prompt=False)
    except (BadPrompt, ModelUnreadable) as error:
        return Check("pair.template", "fail", f"{error}", evidence)
    if text:
        return Check("pair.template", "ok", f"{info.llm.path.name} has a chat template.", evidence)
    odd = "ships no chat template, so a built-in one is used: if answers are odd, take a newer file."
    return Check("pair.template", "warn", f"{info.llm.path.name} {odd}", evidence)


def end_check(source: TemplateSource, eog_texts: Iterable[str], settings: EngineSettings) -> Check:
    """Does the template end an answer as the model does? Raises BadPrompt."""
    if not (source.template or "").strip():
        built_in = choose(source)
        return Check("pair.end", "ok", f"The built-in template called {built_in} stands in.", {"built_in": built_in})
    prompt = PromptBuilder(source).build(_TALK, add_generation_prompt=False)
    rendered = "".join(part.text for part in prompt.parts if isinstance(part, TextPart))
    tail, ends = rendered.partition(_ANSWER)[2], sorted(text for text in eog_texts if text)
    written = next((text for text in (*ends, *prompt.stop) if text in tail), None)
    told = {"after_answer": tail, "end_tokens": ends, "stop_strings": list(prompt.stop)}
    if written:
        return Check("pair.end", "ok", f"The template ends an answer with {written!r}.", told)
    message = (
        f"The template writes {tail!r} behind an answer and none of the end tokens ({', '.join(ends) or 'none'}), so "
        "answers may not end by themselves: take a newer GGUF file, or set --max-tokens."
    )
    return Check("pair.end", "warn", message, told, serve_command(settings, "--max-tokens", _ANSWER_TOKENS))
