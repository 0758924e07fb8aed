"""Every check of a pair: where it fails for the reason it names, and where it passes."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pair_fixes import parsed

from opsin.core.settings import EngineSettings
from opsin.doctor.check import Check
from opsin.doctor.pair import PairInfo, context_check, end_check, header_checks, read_pair, ubatch_check
from opsin.models.pairing import Pair
from opsin.prompt import TemplateSource
from synth import SHAPES, write_pair, write_shape

TOKENS = frozenset({"<s>", "</s>", "<unk>"})
TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}END{% endfor %}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair("tiny", tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def info(pair: Pair) -> PairInfo:
    assert pair.mmproj is not None
    return read_pair(pair)


def of(llm: Path, mmproj: Path | None) -> dict[str, Check]:
    return checked(read_pair(Pair(llm, mmproj, llm.stem)))


def template(end: str, **more: Any) -> TemplateSource:
    values: dict[str, Any] = {"architecture": "llama", "name": "a model", "projector": "mlp", **more}
    return TemplateSource(
        template=TURNS.replace("END", end), bos_token="<s>", eos_token="</s>", control_tokens=TOKENS, **values
    )


def by_name(checks: list[Check]) -> dict[str, Check]:
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def settings_of(info: PairInfo, **settings: Any) -> EngineSettings:
    return EngineSettings(model=info.pair.llm, mmproj=info.pair.mmproj, **settings)


def checked(info: PairInfo) -> dict[str, Check]:
    return by_name(header_checks(info, settings_of(info)))


def loaded(
    info: PairInfo,
    *,
    source: TemplateSource | None = None,
    image_tokens: int = 16,
    ubatch: int = 1024,
    ctx: int = 4096,
    **settings: Any,
) -> dict[str, Check]:
    asked = settings_of(info, **settings)
    fits = [ubatch_check(image_tokens, ubatch, asked), context_check(image_tokens, ctx, info.llm.context, asked)]
    return by_name([*fits, end_check(source or template("</s>"), {"</s>"}, asked)])


def test_a_sound_pair_passes_all(info: PairInfo) -> None:
    found = checked(info)
    assert set(found) == {"pair.projector", "pair.width", "pair.quantisation", "pair.template"}
    then = loaded(info)
    assert set(then) == {"pair.ubatch", "pair.context", "pair.end"}
    assert {check.status for check in (*found.values(), *then.values())} == {"ok"}


def test_a_missing_projector_fails_with_the_one_beside_the_model(info: PairInfo) -> None:
    found = of(info.llm.path, None)
    assert found["pair.projector"].status == "fail"
    assert "reads text only" in found["pair.projector"].message
    wanted = {"model": str(info.llm.path), "mmproj": str(info.mmproj.path), "parallel": 1}
    assert parsed(found["pair.projector"].fix) == ("serve", wanted)
    assert not {"pair.width", "pair.ubatch", "pair.quantisation"} & set(found)


def test_a_missing_projector_of_a_known_model_is_pulled(info: PairInfo, tmp_path: Path) -> None:
    alone = tmp_path / "llava-v1.5-7b-Q4_K_M.gguf"
    shutil.copyfile(info.llm.path, alone)
    found = of(alone, None)
    name, options = parsed(found["pair.projector"].fix)
    assert (name, "llava-1.5-7b") in {(name, value) for value in options.values()}
    stranger = alone.rename(tmp_path / "something.gguf")
    assert of(stranger, None)["pair.projector"].fix is None


def test_files_in_each_others_place_fail(info: PairInfo) -> None:
    found = of(info.mmproj.path, info.llm.path)
    assert found["pair.projector"].status == "fail"
    assert "swap --model and --mmproj" in found["pair.projector"].message
    found = of(info.llm.path, info.llm.path)
    assert "is a language model, not a projector" in found["pair.projector"].message
    assert parsed(found["pair.projector"].fix)[1]["mmproj"] == str(info.mmproj.path)


def test_a_projector_of_another_width_fails_before_loading(pair: Pair, info: PairInfo, tmp_path: Path) -> None:
    tiny = SHAPES["tiny"]
    wide = write_shape(replace(tiny, name="wide", text=replace(tiny.text, width=128)), tmp_path)
    assert wide.mmproj is not None
    stranger = shutil.copyfile(wide.mmproj, pair.llm.with_name("mmproj-stranger.gguf"))
    found = of(info.llm.path, stranger)
    stranger.unlink()
    check = found["pair.width"]
    assert check.status == "fail"
    assert "hands over 128 values a token and tiny-q8_0.gguf takes in 64" in check.message
    assert check.evidence == {"projector_width": 128, "model_width": 64}
    assert parsed(check.fix)[1]["mmproj"] == str(info.mmproj.path)
    assert "pair.ubatch" not in found


def test_a_pair_of_two_families_is_doubted(info: PairInfo) -> None:
    check = checked(replace(info, doubt="they are of different families"))["pair.width"]
    assert (check.status, check.message) == ("warn", "they are of different families.")


def test_a_width_that_the_file_does_not_tell_is_left_to_llama_cpp(info: PairInfo) -> None:
    found = checked(replace(info, mmproj=replace(info.mmproj, projector_width=None)))
    assert found["pair.width"].status == "ok"
    assert "cannot be told" in found["pair.width"].message


@pytest.mark.parametrize(
    ("kind", "status", "said"),
    [
        ("F32", "warn", "--outtype f16"),
        ("Q4_K_M", "warn", "so few bits"),
        ("IQ3_S", "warn", "so few bits"),
        ("F16", "ok", "is F16"),
        ("Q8_0", "ok", "is Q8_0"),
    ],
)
def test_the_projectors_quantisation(info: PairInfo, kind: str, status: str, said: str) -> None:
    mmproj = replace(info.mmproj, quantisation=kind, is_all_f32=kind == "F32")
    check = checked(replace(info, mmproj=mmproj))["pair.quantisation"]
    assert check.status == status
    assert said in check.message


def test_an_all_f32_file_is_told_by_its_header(tmp_path: Path) -> None:
    wide = write_pair("tiny", tmp_path, mmproj_type="f32")
    assert wide.mmproj is not None
    check = of(wide.llm, wide.mmproj)["pair.quantisation"]
    assert check.status == "warn"
    assert "All of mmproj-tiny-f32.gguf is f32" in check.message


def test_images_go_in_slices_and_small_ones_warn(info: PairInfo) -> None:
    check = loaded(info, image_tokens=576, ubatch=256)["pair.ubatch"]
    assert (check.status, check.fix) == ("ok", None)
    assert "3 ubatches of 256" in check.message
    check = loaded(info, image_tokens=576, ubatch=64)["pair.ubatch"]
    assert check.status == "warn"
    assert "9 ubatches of 64" in check.message
    assert parsed(check.fix)[1]["ubatch"] == 768


def test_an_image_that_does_not_fit_the_context_fails(info: PairInfo) -> None:
    check = loaded(info, image_tokens=576, ctx=512, parallel=2, kv_type="q8_0")["pair.context"]
    assert check.status == "fail"
    assert "576 tokens and a question do not fit the context of 512" in check.message
    options = parsed(check.fix)[1]
    assert (options["ctx"], options["parallel"], options["kv_type"]) == (4096, 2, "q8_0")
    fixed = loaded(info, image_tokens=576, ctx=options["ctx"] // options["parallel"])["pair.context"]
    assert fixed.status == "ok"


def test_a_context_that_leaves_no_room_for_the_answer_warns(info: PairInfo) -> None:
    check = loaded(info, image_tokens=576, ctx=768)["pair.context"]
    assert check.status == "warn"
    assert "leaves 128 of 768 for the answer" in check.message
    assert parsed(check.fix)[1]["ctx"] == 2048


def test_an_image_beyond_the_trained_context_has_no_command(info: PairInfo) -> None:
    llm = replace(info.llm, context=512)
    check = loaded(replace(info, llm=llm), image_tokens=576, ctx=512)["pair.context"]
    assert (check.status, check.fix) == ("fail", None)
    assert "--image-max-tokens" in check.message


def test_a_context_longer_than_the_trained_one_warns(info: PairInfo) -> None:
    check = loaded(info, ctx=8192, parallel=2)["pair.context"]
    assert check.status == "warn"
    assert "8192 tokens is longer than the trained 4096" in check.message
    assert parsed(check.fix)[1]["ctx"] == 8192, "4,096 for each of two"
    assert loaded(info, ctx=4096)["pair.context"].status == "ok"


def test_a_missing_template_warns_and_the_one_that_stands_in_is_named(info: PairInfo, tmp_path: Path) -> None:
    bare = write_pair("tiny", tmp_path, template=False)
    assert bare.mmproj is not None
    check = of(bare.llm, bare.mmproj)["pair.template"]
    assert check.status == "warn"
    assert "a built-in one is used" in check.message
    end = loaded(info, source=replace(template(""), template=None))["pair.end"]
    assert (end.status, "vicuna" in end.message) == ("ok", True)
    pages = template("", architecture="deepseek2-ocr", projector="deepseekocr")
    end = loaded(info, source=replace(pages, template=None))["pair.end"]
    assert (end.status, "called plain" in end.message) == ("ok", True), "it has no turns to end"


def test_a_template_that_cannot_be_used_is_seen_by_the_header(info: PairInfo, tmp_path: Path) -> None:
    data = info.llm.path.read_bytes()
    assert data.count(b"{{ bos_token }}A chat") == 1
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data.replace(b"{{ bos_token }}A chat", b"{{ bos_token }!A chat"))
    found = of(bad, info.mmproj.path)
    assert found["pair.template"].status == "fail"
    assert "has a mistake in line 1" in found["pair.template"].message


@pytest.mark.parametrize("text", ["{% for %}", "{{ raise_exception('no') }}"])
def test_a_template_that_cannot_be_used_fails(info: PairInfo, text: str) -> None:
    found = checked(replace(info, source=replace(info.source, template=text)))
    assert found["pair.template"].status == "fail"
    assert "chat template" in found["pair.template"].message


@pytest.mark.parametrize("end", ["", "</s >", " | "])
def test_an_end_token_that_the_template_never_writes_warns(info: PairInfo, end: str) -> None:
    check = loaded(info, source=template(end))["pair.end"]
    assert check.status == "warn"
    assert "may not end by themselves" in check.message
    assert "</s>" in check.message
    assert parsed(check.fix)[1]["max_tokens"] == 256


def test_an_end_token_before_the_answer_does_not_count(info: PairInfo) -> None:
    source = replace(template(""), template="{% for m in messages %}</s>[{{ m.role }}] {{ m.content }}{% endfor %}")
    assert loaded(info, source=source)["pair.end"].status == "warn"


def test_a_turn_marker_without_a_token_ends_answers_as_a_stop_string(info: PairInfo) -> None:
    check = loaded(info, source=template("<|im_end|>"))["pair.end"]
    assert check.status == "ok"
    assert "'<|im_end|>'" in check.message
