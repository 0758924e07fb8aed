"""Do a language model, its projector, its chat template and the settings belong together? Mostly before loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from opsin.core.errors import BadPrompt, ModelError, ModelUnreadable, PairMismatch
from opsin.core.parts import TextPart
from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check
from opsin.doctor.shell import shell_line
from opsin.models.gguf import GgufInfo, read_header
from opsin.models.naming import stem
from opsin.models.pairing import check_pair, find_projector
from opsin.models.registry import is_known, look_up
from opsin.native.devices import CPU_NAMES
from opsin.prompt import Message, PromptBuilder, TemplateSource
from opsin.prompt.builtin import choose

# Tokens of a prompt beside its picture (system sentence, markers, a question), and of an answer.
_TEXT_TOKENS, _ANSWER_TOKENS = 64, 256
_SMALL_UBATCH = 256
_ANSWER = "It is a red kite."
_UNDER_8_BITS = ("Q2", "Q3", "Q4", "IQ1", "IQ2", "IQ3", "IQ4", "TQ", "MXFP4", "NVFP4", "Q1")


@dataclass(frozen=True, slots=True)
class PairFacts:
    """What the files' headers do not tell; what is None is not known, and its checks are left out.

    `template` is what the prompt room needs of the loaded model, `eog_texts` are the texts of its tokens that end a
    turn. `image_tokens` are those of one picture, `causal` is False where a picture attends in both directions.
    `ctx_seq` is what one sequence may hold in tokens, `ubatch` the micro-batch in tokens. `on_cpu` says that the
    encoder runs on the CPU. `settings` are what commands that mend start from.
    """

    template: TemplateSource | None = None
    eog_texts: frozenset[str] | None = None
    image_tokens: int | None = None
    causal: bool = True
    ubatch: int = EngineSettings.model_fields["ubatch"].default
    ctx_seq: int | None = None
    on_cpu: bool = True
    settings: EngineSettings = field(default_factory=EngineSettings)


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """Settings by name as the words of a command."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return words


def serve_command(settings: EngineSettings, *words: object, **update: object) -> str:
    """`opsin serve` with these settings, some of them changed, and more words, quoted for a shell.

    A default that is asked for is written out, since the environment and opsin.toml may say otherwise.
    """
    settings = settings.model_copy(update=update)
    asked = {"parallel", *update}  # the server's own default of parallel is another
    chosen = {
        name: value
        for name, field in EngineSettings.model_fields.items()
        if (value := getattr(settings, name)) is not None and (value != field.default or name in asked)
    }
    return shell_line(["opsin", "serve", *as_flags(chosen), *map(str, words)])


def means_cpu(device: str | None) -> bool:
    """Whether the setting of a device is a word for the CPU."""
    return device is not None and device.strip().lower() in CPU_NAMES


def pair_checks(llm: GgufInfo, mmproj: GgufInfo | None, facts: PairFacts | None = None) -> list[Check]:
    """The checks `pair.*` of two files' headers and of what else is known of the pair.

    With the headers alone: projector, width, quantisation, and whether there is a chat template. Reads both files'
    headers again; raises ModelNotFound and ModelUnreadable when they are gone.
    """
    facts = facts or PairFacts()
    files = {"model": llm.path, "mmproj": mmproj.path if mmproj is not None else None}
    facts = replace(facts, settings=facts.settings.model_copy(update=files))
    checks = _projector(llm, mmproj, facts)
    if mmproj is not None and checks[-1].status == "ok":
        checks.append(_quantisation(mmproj, on_cpu=facts.on_cpu))
        checks += _picture(llm, mmproj, facts)
    checks += _trained_context(llm, facts)
    return checks + _template(llm, mmproj, facts)


def image_tokens_of(mmproj: GgufInfo) -> int | None:
    """Tokens of one picture by the header: told for LLaVA's projectors without tiles, else None."""
    header = read_header(mmproj.path)
    tiles = header.lengths.get("clip.vision.image_grid_pinpoints", 0)
    if mmproj.projector != "mlp" or not mmproj.image_size or not mmproj.patch_size or tiles:
        return None
    return (mmproj.image_size // mmproj.patch_size) ** 2


def _projector(llm: GgufInfo, mmproj: GgufInfo | None, facts: PairFacts) -> list[Check]:
    """`pair.projector`: is it one, and one for pictures; `pair.width`: does it hand over what the model takes in."""
    if mmproj is None:
        message = (
            f"{llm.path.name} has no projector, so it reads text only: give the mmproj file that was published with it."
        )
        return [Check("pair.projector", "fail", message, {"model": str(llm.path)}, _get_projector(llm, facts))]
    wrong = None
    try:
        check_pair(llm.path, mmproj.path)
    except PairMismatch as error:
        wrong = f"{error}".rstrip(".") + "."
    kinds = {"projector": str(mmproj.path), "kind": mmproj.projector}
    widths = {"projector_width": mmproj.projector_width, "model_width": llm.width}
    fits = llm.is_projector or not mmproj.is_projector or not mmproj.has_vision
    if wrong is not None and fits:
        return [Check("pair.projector", "fail", wrong, kinds, _get_projector(llm, facts))]
    checks = [Check("pair.projector", "ok", f"{mmproj.path.name} is a projector for pictures.", kinds)]
    if wrong is not None:
        return [*checks, Check("pair.width", "fail", wrong, widths, _get_projector(llm, facts))]
    if None in widths.values():
        message = "The widths of projector and model cannot be told from the files: llama.cpp compares them at loading."
    else:
        message = f"The projector hands over {llm.width} values a token, which the model takes in."
    return [*checks, Check("pair.width", "ok", message, widths)]


def _get_projector(llm: GgufInfo, facts: PairFacts) -> str | None:
    """The command with the projector that lies beside the model and fits, or the one that downloads the pair."""
    if llm.is_projector:
        return None
    try:
        beside = find_projector(llm.path)
    except (ModelError, OSError):  # one that does not fit, or a folder that cannot be listed
        beside = None
    if beside is not None:
        return serve_command(facts.settings, mmproj=beside)
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


def _picture(llm: GgufInfo, mmproj: GgufInfo, facts: PairFacts) -> list[Check]:
    tokens = facts.image_tokens or image_tokens_of(mmproj)
    if tokens is None:
        return []
    checks = [_micro_batch(facts, tokens)]
    if facts.ctx_seq is not None:
        checks.append(_context(llm, facts, tokens, facts.ctx_seq))
    return checks


def _micro_batch(facts: PairFacts, tokens: int) -> Check:
    name, evidence = "pair.ubatch", {"image_tokens": tokens, "ubatch_tokens": facts.ubatch, "causal": facts.causal}
    if tokens <= facts.ubatch:
        return Check(name, "ok", f"A picture's {tokens} tokens go in one micro-batch of {facts.ubatch}.", evidence)
    fix = serve_command(facts.settings, ubatch=_padded(tokens, 256))
    if not facts.causal:
        message = (
            f"A picture's {tokens} tokens attend in both directions and must go in one micro-batch, "
            f"which holds {facts.ubatch}: give --ubatch {_padded(tokens, 256)}."
        )
        return Check(name, "fail", message, evidence, fix)
    slices = -(-tokens // facts.ubatch)
    if facts.ubatch < _SMALL_UBATCH:
        message = (
            f"A picture's {tokens} tokens go in {slices} slices of {facts.ubatch}, each of which reads all weights: "
            f"give a larger --ubatch, such as {_padded(tokens, 256)}."
        )
        return Check(name, "warn", message, evidence, fix)
    return Check(name, "ok", f"A picture's {tokens} tokens go in {slices} slices of {facts.ubatch}.", evidence)


def _context(llm: GgufInfo, facts: PairFacts, tokens: int, ctx: int) -> Check:
    name = "pair.context"
    evidence = {"image_tokens": tokens, "context_tokens": ctx, "trained_context_tokens": llm.context}
    if tokens + _TEXT_TOKENS + _ANSWER_TOKENS <= ctx:
        pictures = (ctx - _TEXT_TOKENS - _ANSWER_TOKENS) // tokens
        return Check(name, "ok", f"The context of {ctx} tokens holds {pictures} pictures and an answer.", evidence)
    need = _padded(tokens + _TEXT_TOKENS + 4 * _ANSWER_TOKENS, 1024)
    if llm.context is not None and need > llm.context >= tokens + _TEXT_TOKENS:
        need = llm.context
    total = need * facts.settings.parallel
    fix: str | None = serve_command(facts.settings, ctx=total)
    mend = f"give --ctx {total}"
    if llm.context is not None and llm.context < tokens + _TEXT_TOKENS:
        fix, mend = None, f"its language model was trained on {llm.context} only, so give fewer --image-max-tokens"
    if tokens + _TEXT_TOKENS > ctx:
        message = f"One picture's {tokens} tokens and a question do not fit the context of {ctx} tokens: {mend}."
        return Check(name, "fail", message, evidence, fix)
    left = ctx - tokens - _TEXT_TOKENS
    message = f"A picture of {tokens} tokens leaves {left} of {ctx} for the answer, which will be cut: {mend}."
    return Check(name, "warn", message, evidence, fix)


def _trained_context(llm: GgufInfo, facts: PairFacts) -> list[Check]:
    if facts.ctx_seq is None or llm.context is None:
        return []
    name, evidence = "pair.trained_context", {"context_tokens": facts.ctx_seq, "trained_context_tokens": llm.context}
    if facts.ctx_seq <= llm.context:
        message = f"The context of {facts.ctx_seq} tokens is within the {llm.context} that the model was trained on."
        return [Check(name, "ok", message, evidence)]
    total = llm.context * facts.settings.parallel
    message = (
        f"The context of {facts.ctx_seq} tokens is longer than the {llm.context} that the model was trained on: "
        f"answers behind that are nonsense; give --ctx {total}."
    )
    return [Check(name, "warn", message, evidence, serve_command(facts.settings, ctx=total))]


def _template(llm: GgufInfo, mmproj: GgufInfo | None, facts: PairFacts) -> list[Check]:
    """`pair.template`: is there one that can be used; `pair.end`: does it end an answer as the model does."""
    source = facts.template or _source_by_header(llm, mmproj)
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
    checks = [_found_template(llm, evidence, missing=missing)]
    # Models that read pages take one bare instruction: nothing is written behind an answer, and they end by themselves.
    if facts.template is None or facts.eog_texts is None or built_in == "plain":
        return checks
    rendered = "".join(part.text for part in prompt.parts if isinstance(part, TextPart))
    return [*checks, _end(llm, facts, rendered.partition(_ANSWER)[2], prompt.stop)]


def _source_by_header(llm: GgufInfo, mmproj: GgufInfo | None) -> TemplateSource:
    """Enough to see whether the file's template can be used."""
    return TemplateSource(
        template=read_header(llm.path).text("tokenizer.chat_template"),
        architecture=llm.architecture,
        name=f"{llm.name or ''} {llm.path.name}",
        projector=mmproj.projector if mmproj is not None else None,
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


def _end(llm: GgufInfo, facts: PairFacts, tail: str, stop: Sequence[str]) -> Check:
    name, ends = "pair.end", sorted(text for text in facts.eog_texts or () if text)
    written = [text for text in (*ends, *stop) if text in tail]
    evidence = {"after_answer": tail, "end_tokens": ends, "stop_strings": list(stop)}
    if written:
        return Check(name, "ok", f"The template ends an answer with {written[0]!r}, which ends it here too.", evidence)
    message = (
        f"The template writes {tail!r} behind an answer and none of the tokens that end one "
        f"({', '.join(ends) or 'the model has none'}), so answers may not end by themselves: take a newer GGUF file of "
        f"{llm.path.name}; until then a smaller --max-tokens bounds them."
    )
    fix = serve_command(facts.settings, "--max-tokens", _ANSWER_TOKENS)
    return Check(name, "warn", message, evidence, fix)


def _padded(tokens: int, step: int) -> int:
    return -(-tokens // step) * step
