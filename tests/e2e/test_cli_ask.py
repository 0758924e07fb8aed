"""`opsin ask` as a user types it, in a process of its own, on the shipped demo model."""

import csv
import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

STAGES = {
    "queue_ms", "load_ms", "fetch_ms", "image_decode_ms", "preprocess_ms", "encode_ms", "image_prefill_ms",
    "text_prefill_ms", "sample_ms", "decode_ms", "detokenize_ms", "other_ms", "total_ms",
}  # fmt: skip
TIMINGS = {
    "cache_n", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second",
    "predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second",
    "draft_n", "draft_n_accepted",
}  # fmt: skip
DEMO = Path(__file__).parents[2] / "src" / "opsin" / "models" / "demo"
IMAGE = str(DEMO / "shapes.png")


def opsin(
    env: dict[str, str], *arguments: str, stdin: bytes | None = None, code: int = 0
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [sys.executable, "-m", "opsin", *arguments], input=stdin, capture_output=True, env=env, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


def test_every_shipped_example_is_answered_rightly(opsin_env: dict[str, str]) -> None:
    for row in json.loads((DEMO / "examples.json").read_text()):
        done = opsin(opsin_env, "ask", str(DEMO / row["image"]), row["question"], "--temperature", "0")
        assert done.stdout.decode().strip() == row["answer"]


def test_an_image_asked_about_yesterday_is_not_encoded_today(opsin_env: dict[str, str], tmp_path: Path) -> None:
    env = {**opsin_env, "XDG_CACHE_HOME": str(tmp_path)}
    rows = [json.loads(opsin(env, "ask", IMAGE, question, "--json").stdout) for question in ("What is it?", "Why?")]
    assert rows[0]["stages"]["encode_ms"] > 0
    assert rows[1]["stages"]["encode_ms"] == 0


def test_the_timeline_and_the_honest_line_go_to_standard_error(opsin_env: dict[str, str]) -> None:
    quiet = opsin(opsin_env, "ask", IMAGE, "What is in this picture?").stderr.decode()
    assert "load model" not in quiet, "a timeline is for a terminal"
    shown = opsin(opsin_env, "ask", IMAGE, "What is in this picture?", "--timeline").stderr.decode()
    assert "demo model for drawn scenes" in shown
    assert "opsin pull" in shown
    for row in (
        "load model",
        "image decode",
        "preprocess",
        "vision encode",
        "image prefill",
        "text prefill",
        "decode",
        "total",
    ):
        assert row in shown
    assert "image tokens" in shown
    assert "token/s" in shown
    assert "CPU" in shown


def claimed(stages: dict[str, float]) -> float:
    """The share of the total time that stages account for."""
    return sum(ms for name, ms in stages.items() if name not in {"total_ms", "other_ms"}) / stages["total_ms"]


def test_json_has_the_fields_of_the_contract_and_stages_that_add_up(opsin_env: dict[str, str]) -> None:
    done = opsin(opsin_env, "ask", IMAGE, "How many objects are there?", "--json")
    rows = done.stdout.decode().splitlines()
    assert len(rows) == 1
    row = json.loads(rows[0])
    assert set(row) == {
        "source", "error", "text", "reasoning", "finish_reason", "usage", "images", "stages", "timings", "placement",
        "model", "guard",
    }  # fmt: skip
    assert set(row["stages"]) == STAGES
    assert set(row["timings"]) == TIMINGS
    assert set(row["usage"]) == {"prompt_tokens", "completion_tokens", "image_tokens", "cached_tokens"}
    sizes = {"width", "height", "resized_width", "resized_height", "tokens"}
    assert set(row["images"][0]) >= {"sha256", *sizes, "notes", "page"}
    assert set(row["model"]) == {"name", "architecture", "projector", "llm_file", "mmproj_file", "quantisation"}
    assert row["placement"]["encoder"]["CPU"]["nodes"] > 0
    assert row["placement"]["language_model"]["CPU"]["share_of_ops"] == pytest.approx(1.0)
    # A busy machine may stop the process between two stages: of three answers one is left alone.
    again = (json.loads(opsin(opsin_env, "ask", IMAGE, "How many objects are there?", "--json").stdout) for _ in "12")
    assert any(claimed(each["stages"]) >= 0.97 for each in itertools.chain([row], again))
    assert row["images"][0]["tokens"] == row["usage"]["image_tokens"] > 0
    assert row["guard"] is None


@pytest.mark.parametrize("form", ["jsonl", "csv", "md"])
def test_a_timeline_that_is_asked_for_comes_with_every_format(opsin_env: dict[str, str], form: str) -> None:
    asked = ("ask", IMAGE, "How many objects are there?", "--format", form)
    assert b"vision encode" in opsin(opsin_env, *asked, "--timeline").stderr
    assert b"vision encode" not in opsin(opsin_env, *asked).stderr


def test_several_images_are_asked_one_by_one_and_a_bad_one_loses_nothing(
    opsin_env: dict[str, str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    done = opsin(opsin_env, "ask", IMAGE, str(bad), IMAGE, "How many objects are there?", "--json", code=1)
    rows = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [row["source"] for row in rows] == [IMAGE, str(bad), IMAGE]
    assert [row["error"] and row["error"]["code"] for row in rows] == [None, "bad_image", None]
    assert rows[0]["text"] == rows[2]["text"] is not None
    assert "bad.png" in done.stderr.decode()


def test_together_asks_once(opsin_env: dict[str, str]) -> None:
    done = opsin(opsin_env, "ask", IMAGE, IMAGE, "what is this?", "--together", "--json", "--max-tokens", "8")
    row = json.loads(done.stdout)
    assert len(row["images"]) == 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images and other things, with names that sort in two ways."""
    shots = tmp_path / "shots"
    (shots / "sub").mkdir(parents=True)
    for name in ("p10.png", "p2.png", "x.jfif", ".hidden.png", "._p2.png", "sub/deep.JPE"):
        shutil.copy(IMAGE, shots / name)
    for name in ("raw.cr2", "doc.docx"):
        (shots / name).write_bytes(b"%PDF-1.7")
    return shots


def test_a_folders_captions_come_with_their_names_in_natural_order(opsin_env: dict[str, str], folder: Path) -> None:
    done = opsin(opsin_env, "ask", str(folder), "what is this?")
    lines = [line.split("\t") for line in done.stdout.decode().splitlines()]
    assert [Path(name).name for name, _ in lines] == ["p2.png", "p10.png", "x.jfif"]
    assert all(caption for _, caption in lines)
    said = done.stderr.decode()
    assert "(2 files were left out, no image that can be read: doc.docx, raw.cr2)" in said
    assert "(1 folder was left out, -r reads folders, too: sub)" in said
    assert "(3 of 3 done in" in said
    assert "hidden" not in said


@pytest.mark.parametrize("form", ["jsonl", "csv", "md"])
def test_formats_have_a_row_for_every_image_and_every_failure(
    opsin_env: dict[str, str], folder: Path, form: str
) -> None:
    (folder / "p3.png").write_bytes(b"no image")
    done = opsin(opsin_env, "ask", str(folder), "-r", "what is this?", "--format", form, code=1)
    out = done.stdout.decode()
    names = ["p2.png", "p3.png", "p10.png", "deep.JPE", "x.jfif"]
    if form == "jsonl":
        rows = [json.loads(line) for line in out.splitlines()]
        assert [Path(row["source"]).name for row in rows] == names
        assert [bool(row["error"]) for row in rows] == [name == "p3.png" for name in names]
    elif form == "csv":
        table = list(csv.DictReader(io.StringIO(out)))
        assert [Path(row["source"]).name for row in table] == names
        assert [bool(row["error"]) for row in table] == [not row["text"] for row in table]
    else:
        cells = [line.strip("| ").split(" | ") for line in out.splitlines()]
        assert cells[:2] == [["Image", "Answer"], ["---", "---"]]
        assert [Path(row[0]).name for row in cells[2:]] == names
        assert cells[3][1].startswith("Error: ")
    assert "(4 of 5 done, 1 failed in" in done.stderr.decode()


def test_what_was_done_to_an_image_is_told(opsin_env: dict[str, str], tmp_path: Path) -> None:
    white = Image.new("RGBA", (40, 40), (255, 255, 255, 0))
    white.paste((255, 255, 255, 255), (10, 10, 20, 20))
    white.save(tmp_path / "a.png")
    Image.open(IMAGE).convert("RGB").save(
        tmp_path / "b.gif", save_all=True, append_images=[Image.new("RGB", (448, 448))]
    )
    note = "transparent parts were filled with black"
    done = opsin(opsin_env, "ask", str(tmp_path / "a.png"), "what is this?")
    assert f"({note})" in done.stderr.decode()
    done = opsin(opsin_env, "ask", str(tmp_path), "what is this?", "--max-tokens", "4")
    assert f"({tmp_path}/a.png: {note})" in done.stderr.decode()
    rows = map(json.loads, opsin(opsin_env, "ask", str(tmp_path), "what?", "--json").stdout.splitlines())
    several = "only the first of 2 frames or pages was read"
    assert [row["images"][0]["notes"] for row in rows] == [[note], [several]]


@pytest.mark.parametrize("several", [False, True])
def test_half_a_json_document_is_an_error(opsin_env: dict[str, str], tmp_path: Path, several: bool) -> None:
    (tmp_path / "s.json").write_text('{"type": "array", "items": {"type": "boolean"}, "minItems": 90}')
    env = {**opsin_env, "HOME": str(tmp_path)}
    asked = ["ask", *[IMAGE] * (1 + several), "what?", "--json-schema=~/s.json", "--max-tokens", "4"]
    assert opsin(env, *asked, code=1).stdout == b""
    done = opsin(env, *asked, "--json", code=1)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["error"]["code"], row["text"]) for row in rows] == [("constraint_failed", None)] * (1 + several)


def test_a_quoted_tilde_is_the_home_folder(opsin_env: dict[str, str], folder: Path) -> None:
    env = {**opsin_env, "HOME": str(folder)}
    assert opsin(env, "ask", "~/p2.png", "what?", "--json", "--max-tokens", "4").stdout


@pytest.mark.parametrize("arguments", [["--version"], ["-V"], ["-h"], ["help"], ["help", "ask"], ["ask", "-h"]])
def test_help_and_version_end_well(opsin_env: dict[str, str], arguments: list[str]) -> None:
    assert opsin(opsin_env, *arguments).stdout


def test_a_reader_who_leaves_a_long_run_ends_it_without_words(opsin_env: dict[str, str], tmp_path: Path) -> None:
    code, images = tmp_path / "code", " ".join([IMAGE] * 30)
    ask = f"opsin ask {images} 'what?' --json 2>{tmp_path}/said; echo $? > {code}"
    shell(opsin_env, f"({ask}) | head -c1", 0)
    assert code.read_text().strip() == "141"
    assert "opsin:" not in (tmp_path / "said").read_text()


@pytest.mark.parametrize("module", ["typer.main", "opsin.cli.app", "rich.console", "opsin.api"])
def test_an_early_interrupt_ends_without_a_traceback(opsin_env: dict[str, str], module: str) -> None:
    """As soon as this module was imported, most of them in the first 0.1 s."""
    command = [sys.executable, "-X", "importtime", "-m", "opsin", "ask", *[IMAGE] * 200, "what?", "--json"]
    for _ in range(3):  # Python swallows one that comes in a callback, as of a weak reference
        with subprocess.Popen(command, env=opsin_env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            assert process.stderr is not None
            while not re.search(rf"\| +{re.escape(module)}\n", process.stderr.readline().decode()):
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1].decode()
        if process.returncode:
            break
    # Python ends by the signal itself where it came in code made from text, as that of dataclasses: 130 for a shell.
    assert process.returncode in {130, -signal.SIGINT}
    assert "Traceback" not in said


def test_an_interrupted_run_says_how_far_it_came(opsin_env: dict[str, str]) -> None:
    command = [sys.executable, "-m", "opsin", "ask", *[IMAGE] * 3000, "what?", "--json", "--max-tokens", "4"]
    with subprocess.Popen(command, env=opsin_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert re.search(r"stopped: \d+ of 3,000 done", said)


def test_a_folder_is_all_its_images(opsin_env: dict[str, str], tmp_path: Path) -> None:
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (64, 64), "white").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    done = opsin(opsin_env, "ask", str(tmp_path), "what is this?", "--json", "--max-tokens", "8")
    assert len(done.stdout.splitlines()) == 2


def test_standard_input_is_an_image(opsin_env: dict[str, str]) -> None:
    piped = opsin(
        opsin_env, "ask", "-", "how many objects are there?", "--temperature", "0", stdin=Path(IMAGE).read_bytes()
    )
    named = opsin(opsin_env, "ask", IMAGE, "how many objects are there?", "--temperature", "0")
    assert piped.stdout == named.stdout


def test_a_schema_shapes_the_answer(opsin_env: dict[str, str], tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        json.dumps(
            {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
        )
    )
    done = opsin(opsin_env, "ask", IMAGE, "how many?", "--json-schema", str(schema), "--max-tokens", "40")
    assert isinstance(json.loads(done.stdout)["n"], int)


def test_an_answer_that_is_cut_says_so_and_how_to_lift_it(opsin_env: dict[str, str]) -> None:
    done = opsin(opsin_env, "ask", IMAGE, "what is this?", "--max-tokens", "2")
    assert "cut after 2 tokens; --max-tokens N lifts the limit" in done.stderr.decode()


def test_native_logs_are_silent_without_verbose_and_whole_with_it(opsin_env: dict[str, str]) -> None:
    quiet = opsin(opsin_env, "ask", IMAGE, "what is this?", "--json")
    assert quiet.stderr.count(b"\n") == 1, quiet.stderr.decode()
    loud = opsin(opsin_env, "ask", IMAGE, "what is this?", "--json", "--verbose").stderr.decode()
    for piece in ("llama_model_loader", "print_info", "clip", "llama_context"):
        assert piece in loud


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.png", "what?"], 2, "nowhere.png"),
        ([IMAGE], 2, "question is missing"),
        ([IMAGE, IMAGE], 2, "question is missing"),
        ([IMAGE, "nowhere.PNG"], 2, "question is missing"),
        (["nowhere.png", "what?", "--model", "nowhere.gguf"], 2, "nowhere.png"),
        (["nowhere.png", "no.png", "what?", "--model", "nowhere.gguf"], 1, "0 of 2 done, 2 failed"),
        ([IMAGE, "  ", "--model", "nowhere.gguf"], 2, "question is empty"),
        ([IMAGE, "what?", "--max-tokens", "-1", "--model", "nowhere.gguf"], 2, "max_tokens"),
        ([IMAGE, "what?", "--temperature", "99", "--model", "nowhere.gguf"], 2, "temperature"),
        ([IMAGE, "what?", "--json-schema=~/nowhere.json"], 2, str(Path("~/nowhere.json").expanduser())),
        ([IMAGE, IMAGE, "what?", "--kv-type", "q9"], 2, "kv_type"),
        ([IMAGE, IMAGE, "what?", "--model", "nowhere.gguf"], 3, "nowhere.gguf"),
        (["what is this?"], 2, "image is missing"),
        ([IMAGE, "  "], 2, "question is empty"),
        ([IMAGE, "what?", "--temperature", "-1"], 2, "temperature"),
        ([IMAGE, "what?", "--kv-type", "q9"], 2, "kv_type"),
        ([IMAGE, "what?", "--device", "CUDA7"], 2, "CUDA7"),
        ([IMAGE, "what?", "--model", "nowhere.gguf"], 3, "nowhere.gguf"),
        ([IMAGE, "what?", "--model", IMAGE], 3, "shapes.png"),
        ([IMAGE, "what is this? " * 200, "--ctx", "256"], 2, "--ctx"),
        ([IMAGE, "what?", "--json-schema", "nowhere.json"], 2, "nowhere.json"),
        ([IMAGE, "what?", "--nonsense"], 2, "nonsense"),
        (["", "what?"], 2, "name is empty"),
        (["x" * 300], 2, "image is missing"),
        (["x" * 300, "what?"], 2, "too long"),
        ([IMAGE, "what?", "--json-schema", "/dev/zero"], 2, "not a regular file"),
        ([IMAGE, "what?", "--model", "y" * 300], 3, "too long"),
        ([IMAGE, "what?", "--model", "~nosuchuser/m.gguf"], 2, "home folder"),
        ([IMAGE, "what?", "--ctx", str(2**32 + 64)], 2, "ctx"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_an_exit_code(
    opsin_env: dict[str, str], arguments: list[str], code: int, words: str
) -> None:
    done = opsin(opsin_env, "ask", *arguments, code=code)
    last = done.stderr.decode().strip().splitlines()[-1]
    assert words in last
    assert done.stdout == b""


def shell(env: dict[str, str], line: str, code: int) -> subprocess.CompletedProcess[bytes]:
    """A command line with `opsin` in it, for redirections that Python's own pipes cannot make."""
    line = line.replace("opsin ", f"{sys.executable} -m opsin ", 1)
    done = subprocess.run(["sh", "-c", line], capture_output=True, env=env, timeout=120, check=False)
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("opsin ask {image} 'what is this?' > /dev/full", 1, "No space left"),
        ("opsin ask {image} {image} 'what is this?' --json > /dev/full", 1, "No space left"),
        ("opsin ask {image} 'what is this?' --format csv > /dev/full", 1, "No space left"),
        ("opsin models > /dev/full", 1, "No space left"),
        ("opsin ask {image} 'what is this?' >&-", 1, "standard output"),
        ("opsin ask - 'what is this?' <&-", 2, "is empty"),
        ("opsin ask - 'what is this?' < /dev/zero", 2, "is larger than"),
    ],
)
def test_streams_that_are_closed_or_full_are_one_sentence(
    opsin_env: dict[str, str], line: str, code: int, says: str
) -> None:
    done = shell(opsin_env, line.format(image=IMAGE), code)
    assert says in done.stderr.decode()


def test_without_standard_error_the_answer_comes_all_the_same(opsin_env: dict[str, str]) -> None:
    done = shell(opsin_env, f"opsin ask {IMAGE} 'What is in this picture?' 2>&-", 0)
    assert done.stdout.strip()


def test_a_reader_who_leaves_has_an_exit_code_of_its_own(opsin_env: dict[str, str], tmp_path: Path) -> None:
    code = tmp_path / "code"
    shell(opsin_env, f"(opsin models --known --json; echo $? > {code}) | true", 0)
    assert code.read_text().strip() == "141"


def test_names_cannot_steer_the_terminal_or_fake_a_line(opsin_env: dict[str, str], tmp_path: Path) -> None:
    for name in ("a\x1b]0;n.png", "b\nopsin: fine.png"):
        (tmp_path / name).write_bytes(b"no image")
    done = opsin(opsin_env, "ask", str(tmp_path), "what?", code=1)
    said = done.stderr.decode()
    assert "\x1b" not in said
    assert "\\x1b]0;n.png" in said
    assert not any(line.startswith("opsin: fine") for line in said.splitlines())


def test_the_current_folder_may_be_gone(opsin_env: dict[str, str], tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = shell(opsin_env, f"cd {gone}; rmdir {gone}; opsin ask {IMAGE} 'what is this?'", 0)
    assert done.stdout.strip()


def test_folders_that_cannot_be_are_no_reason_to_stop(opsin_env: dict[str, str]) -> None:
    env = {**opsin_env, "XDG_DATA_HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "XDG_CONFIG_HOME": "/dev/null"}
    assert opsin(env, "ask", IMAGE, "what is this?").stdout.strip()


def test_a_retired_option_is_accepted_with_a_warning(opsin_env: dict[str, str]) -> None:
    env = {**opsin_env, "OPSIN_SLICE_SECONDS": "0.5"}
    done = opsin(env, "ask", IMAGE, "what is this?", "--profile", "throughput", "--max-thinking-tokens", "0")
    assert done.stdout.strip()
    assert "profile" in done.stderr.decode()
    assert "OPSIN_SLICE_SECONDS" in done.stderr.decode()


def test_the_limit_on_reasoning_reaches_the_engine(opsin_env: dict[str, str]) -> None:
    """No flag did."""
    code = f"""
import sys
from opsin.__main__ import main
from opsin.engine import Engine
submit = Engine.submit
def noted(engine, prompt, params, **options):
    print(f"<{{params.max_thinking_tokens}}>")
    return submit(engine, prompt, params, **options)
Engine.submit = noted
sys.argv[1:] = ["ask", {IMAGE!r}, "what is this?", "--max-thinking-tokens", "0"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=opsin_env, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"<0>" in done.stdout


def test_help_is_quick(opsin_env: dict[str, str]) -> None:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        opsin(opsin_env, "--help")
        times.append(time.perf_counter() - start)
    print(f"opsin --help: {min(times):.3f} s")
    assert min(times) <= 0.3


def test_chat_remembers_the_conversation(opsin_env: dict[str, str]) -> None:
    lines = "how many objects are there?\n/unknown\n/image nowhere.png\nwhat is this?\n/bye\n"
    done = opsin(opsin_env, "chat", IMAGE, "--temperature", "0", stdin=lines.encode())
    assert len(done.stdout.decode().strip().splitlines()) == 2
    assert "nowhere.png" in done.stderr.decode()


def test_an_array_a_pil_image_bytes_and_a_path_are_one_image() -> None:
    from opsin import Opsin

    image = Image.open(IMAGE).convert("RGB")
    with Opsin() as model:
        answers = [
            model.ask(source, "what is this?", temperature=0)
            for source in (IMAGE, Path(IMAGE), Path(IMAGE).read_bytes(), image, np.asarray(image))
        ]
        assert len({answer.images[0].sha256 for answer in answers}) == 1
        assert len({answer.text for answer in answers}) == 1
        assert model.info.architecture == "llama"


@pytest.mark.parametrize("asked", ["", "stream = model.submit([Message('user', ['count'])], max_tokens=500)"])
def test_a_model_that_was_never_closed_does_not_abort_at_the_end(opsin_env: dict[str, str], asked: str) -> None:
    """A computing engine beside an ending interpreter died of SIGABRT."""
    code = f"from opsin import Message, Opsin\nmodel = Opsin()\n{asked}\nprint('end')"
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=opsin_env, timeout=60, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"end\n", b"")


def test_an_image_that_was_read_already_can_be_asked_about() -> None:
    from opsin import Opsin

    with Opsin() as model:
        image = model.image(IMAGE)
        assert model.image(image) is image
        assert model.ask(image, "what is this?", temperature=0).text


def test_a_terminal_of_few_characters_loses_some_and_no_more(opsin_env: dict[str, str]) -> None:
    log = Path(__file__).parents[1] / "logs" / "lcp-0.2.56-founding.log"
    command = [sys.executable, "-m", "opsin", "explain", str(log)]
    poor = {**opsin_env, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, env=poor, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"?940.4 ms" in done.stdout
