"""What nobody would send, through each entrance of a user: an answer or one sentence, within seconds and a gigabyte.

Images, GGUF headers, chat templates, file names and request bodies are drawn by hypothesis, always the same ones. They
go in through the Python API, the command (in this process, and as a child that may use 1 GB), and `opsin serve`.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import resource
import string
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from serve_process import Served, question, served

import opsin.models
from opsin.cli.app import main
from opsin.core.errors import BadInput, ModelError, OpsinError
from opsin.core.settings import ImageSettings
from opsin.images import load_image
from opsin.models.gguf import read_header, read_info
from opsin.prompt import Message, PromptBuilder, TemplateSource
from opsin.server.schema import ChatRequest

pytestmark = [pytest.mark.slow, pytest.mark.native]

DEMO = Path(opsin.models.__file__).parent / "demo"
LLM, MMPROJ, SHAPES = DEMO / "opsin-demo.gguf", DEMO / "mmproj-opsin-demo.gguf", DEMO / "shapes.png"
SECONDS, BYTES = 10.0, 2**30
CODES = {0, 1, 2, 3}


def drawn(count: int) -> settings:
    """The same `count` examples each time."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(derandomize=True, deadline=None, max_examples=count, suppress_health_check=quiet)


def image_file(kind: str) -> bytes:
    file = io.BytesIO()
    Image.radial_gradient("L").resize((24, 16)).convert("RGB").save(file, kind)
    return file.getvalue()


IMAGES = [image_file(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")]
SIZES = [b"\x00" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\x01\0\0\0", b"\x00\x10\x00\x00"]


@st.composite
def damaged(draw: Any, data: bytes, head: int = 2**16) -> bytes:
    """The bytes with some of the first `head` changed, cut out, put in, or the whole cut short."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(head, max(1, len(out))) - 1))
        match draw(st.sampled_from(["set", "size", "insert", "drop", "cut"])):
            case "set":
                out[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "size":
                out[at : at + 4] = draw(st.sampled_from(SIZES))
            case "insert":
                out[at:at] = draw(st.binary(min_size=1, max_size=12))
            case "drop":
                del out[at : at + draw(st.integers(1, 12))]
            case _:
                del out[at:]
    return bytes(out)


damaged_images = st.sampled_from(IMAGES).flatmap(damaged) | st.binary(max_size=60)
# Any bytes but those that no name has; a dot in front, so that it is no name of a folder.
file_names = st.binary(min_size=1, max_size=60).map(lambda raw: b"n" + raw.replace(b"/", b"").replace(b"\0", b""))


def text_of(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


KEYS = [
    b"general.architecture", b"general.name", b"general.basename", b"general.base_model.0.name", b"general.alignment",
    b"general.type", b"general.file_type", b"llama.embedding_length", b"llama.block_count", b"llama.context_length",
    b"clip.projector_type", b"clip.has_vision_encoder", b"clip.vision.image_size", b"clip.vision.patch_size",
    b"tokenizer.chat_template", b"tokenizer.ggml.tokens",
]  # fmt: skip
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
counts = st.integers(0, 6) | st.sampled_from([2**16, 2**31, 2**32, 2**62, 2**63, 2**64 - 1])
words = st.sampled_from([b"llama", b"clip", b"mlp", b"gemma3", b"\x1b]0;x\x07", b"a\nb", b"\xff\xfe"]) | st.binary(
    max_size=20
)


@st.composite
def values(draw: Any) -> bytes:
    """A kind and a value of that kind; seldom a kind that does not exist."""
    kind = draw(st.sampled_from([*WIDTHS, *[8] * 4, *[9] * 8, 99]))
    if kind in WIDTHS:
        raw = draw(st.binary(min_size=WIDTHS[kind], max_size=WIDTHS[kind]))
    elif kind == 8:
        raw = text_of(draw(words))
    elif kind == 9:
        inner, items = draw(st.sampled_from([0, 4, 8, 8, 8, 9, 77])), draw(st.lists(words, max_size=3))
        told = draw(st.just(len(items)) | counts)
        lie = draw(st.just(b"") | counts.map(lambda size: struct.pack("<Q", size)))  # of the first text's length
        raw = struct.pack("<IQ", inner, told) + lie + b"".join(text_of(item) if inner == 8 else item for item in items)
    else:
        raw = b""
    return struct.pack("<I", kind) + raw


@st.composite
def headers(draw: Any) -> bytes:
    """A GGUF file of keys and tensors as they come, whose counts may lie."""
    keys = draw(st.lists(st.tuples(st.sampled_from(KEYS) | words, values()), max_size=6))
    named = draw(st.booleans())
    body = [text_of(b"general.architecture") + struct.pack("<I", 8) + text_of(draw(words))] if named else []
    body += [text_of(key) + value for key, value in keys]
    tensors = draw(st.lists(st.tuples(words, st.lists(counts, max_size=5), st.integers(0, 40), counts), max_size=3))
    for name, shape, kind, offset in tensors:
        body.append(text_of(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
    version = draw(st.sampled_from([3, 3, 3, 3, 2, 1, 0x03000000]))
    told = draw(st.just((len(tensors), len(keys) + named)) | st.tuples(counts, counts))
    return b"GGUF" + struct.pack("<IQQ", version, *told) + b"".join(body) + draw(st.binary(max_size=64))


PIECES = [
    "{{ messages[0].content }}", "{% for m in messages %}", "{% endfor %}", "{% if tools %}", "{% endif %}",
    "{{ bos_token }}", "{{ m.content }}", "{{ m['role'] }}", "{{ 'a' * 10**9 }}", "{{ 9 ** 9 ** 9 }}", "{{", "}}", "{%",
    "%}", "{#", "{{ x.y.z }}", "{{ raise_exception('no') }}", "{% set x = messages %}", "{{ x ~ x }}", "{{ 1 / 0 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% include 'a' %}", "{{ ''.__class__ }}", "{{ [1] | random }}",
    "{% for i in range(99999) %}", "{{ messages | tojson }}", "{{ messages | length }}", "{% generation %}",
    "{{ strftime_now('%Y') }}", "<image>", "</s>", "{{ ''.center(10**9) }}",
]  # fmt: skip
templates = st.lists(st.sampled_from(PIECES) | st.text(max_size=8), min_size=1, max_size=8).map("".join)


def as_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def is_sentence(text: str) -> bool:
    return text.isprintable() and 10 < len(text) < 600 and "Traceback" not in text


@contextlib.contextmanager
def in_order(refusals: type[OpsinError] = OpsinError) -> Iterator[None]:
    """The block ends soon, with one sentence at most."""
    began, said = time.monotonic(), None
    try:
        yield
    except refusals as error:
        said = str(error)
    assert time.monotonic() - began < SECONDS
    assert said is None or is_sentence(said), said


# The Python API.


@drawn(800)
@given(data=headers())
def test_a_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.gguf"
    path.write_bytes(data)
    for read in (read_header, read_info):
        with in_order(ModelError):
            read(path)


def drawn_file(folder: pytest.TempPathFactory, name: bytes, data: bytes) -> Path:
    path = Path(os.fsdecode(os.fsencode(folder.getbasetemp()) + b"/" + name))
    path.write_bytes(data)
    return path


@drawn(200)
@given(name=file_names, data=damaged_images)
def test_an_image_of_any_name_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: bytes, data: bytes
) -> None:
    path = drawn_file(tmp_path_factory, name, data)
    url = as_url(data)
    for source in (path, str(path), data, url, url[: len(data)], os.fsdecode(name)):
        with in_order(BadInput):
            load_image(source, ImageSettings(fetch=False))
    path.unlink()


@drawn(16)
@given(template=templates)
def test_a_template_writes_prompts_or_is_refused(template: str) -> None:
    source = TemplateSource(template, "llama", "a model", "mlp", "<s>", "</s>", frozenset({"<s>", "</s>"}))
    with in_order():
        PromptBuilder(source).build([Message("user", "What is this?")])


# The command.


def said_well(code: int, err: str) -> None:
    """An exit code that is meant, and one sentence of what is wrong."""
    assert code in CODES, err
    assert "Traceback" not in err
    assert "\x1b" not in err
    sentences = [line for line in err.splitlines() if line.startswith("opsin: ")]
    assert len(sentences) == (0 if code == 0 else 1), err


def in_process(*arguments: str) -> tuple[int, str]:
    """The command in this process: its exit code and standard error."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["opsin", *arguments]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            in_order(),
            pytest.raises(SystemExit) as left,
        ):
            main()
    finally:
        sys.argv = before
    return int(left.value.code or 0), err.getvalue()


ASKED = ("what is this?", "--max-tokens", "4", "--no-disk-cache")


@drawn(40)
@given(name=file_names, data=damaged_images)
def test_ask_answers_about_an_image_or_says_what_is_wrong(
    tmp_path_factory: pytest.TempPathFactory, name: bytes, data: bytes
) -> None:
    path = drawn_file(tmp_path_factory, name, data)
    said_well(*in_process("ask", str(path), *ASKED))
    path.unlink()


names = st.text(max_size=40).filter(lambda name: not name.startswith("-") and "://" not in name and "\0" not in name)


@drawn(40)
@given(image=names, words=names)
def test_ask_takes_any_words(tmp_path_factory: pytest.TempPathFactory, image: str, words: str) -> None:
    with contextlib.chdir(tmp_path_factory.getbasetemp()):
        said_well(*in_process("ask", image, words, "--max-tokens", "4", "--no-disk-cache"))


@drawn(40)
@given(data=headers() | damaged(LLM.read_bytes()[:6000], 3000))
def test_ask_refuses_a_model_that_is_none(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.gguf"
    path.write_bytes(data)
    for pair in (["--model", str(path)], ["--model", str(LLM), "--mmproj", str(path)]):
        code, err = in_process("ask", str(SHAPES), *ASKED, *pair)
        said_well(code, err)
        assert code == 3, err


@drawn(40)
@given(data=st.lists(headers(), min_size=1, max_size=3))
def test_the_list_of_models_is_whole(tmp_path_factory: pytest.TempPathFactory, data: list[bytes]) -> None:
    folder = tmp_path_factory.mktemp("listed")
    for number, one in enumerate(data):
        (folder / f"{number}.gguf").write_bytes(one)
        (folder / f"mmproj-{number}.gguf").write_bytes(one)
    code, err = in_process("models", "--folder", str(folder), "--json")
    said_well(code, err)
    assert code == 0


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def as_child(*arguments: str) -> None:
    """The command as a user runs it, with 1 GB of memory for it and whatever it starts."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPSIN_")}
    env["PYTHONPATH"] = str(Path(opsin.__file__).parents[1])
    command = [sys.executable, "-m", "opsin", *arguments]
    done = subprocess.run(
        command,
        env=env,
        capture_output=True,
        timeout=SECONDS,
        check=False,
        preexec_fn=limited,
        stdin=subprocess.DEVNULL,
    )
    said_well(done.returncode, done.stderr.decode("utf-8", "replace"))


def with_template(template: str) -> bytes:
    """The demo model with another chat template; as many bytes more as keep the weights aligned."""
    data = LLM.read_bytes()
    at = data.index(b"tokenizer.chat_template") + len("tokenizer.chat_template") + 4
    size = int.from_bytes(data[at : at + 8], "little")
    text = template.encode("utf-8", "replace")
    text += b" " * ((size - len(text)) % 32)
    return data[:at] + text_of(text) + data[at + 8 + size :]


@drawn(8)
@given(data=damaged_images)
def test_a_child_with_a_drawn_image(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.png"
    path.write_bytes(data)
    as_child("ask", str(path), *ASKED)


@drawn(8)
@given(data=damaged(LLM.read_bytes(), 3000) | templates.map(with_template))
def test_a_child_with_a_drawn_model(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.gguf"
    path.write_bytes(data)
    as_child("ask", str(SHAPES), *ASKED, "--model", str(path), "--mmproj", str(MMPROJ))


@drawn(4)
@given(data=damaged(MMPROJ.read_bytes(), 3000))
def test_a_child_with_a_drawn_projector(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.gguf"
    path.write_bytes(data)
    as_child("ask", str(SHAPES), *ASKED, "--model", str(LLM), "--mmproj", str(path))


# The server.


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--max-tokens", "8", "--max-seconds", "3") as running:
        worker = running.worker
        yield running
        front = psutil.Process(running.process.pid)
        peaks = {one.pid: peak(one.pid) for one in [front, *front.children(recursive=True)]}
        assert max(peaks.values()) < BYTES, peaks
        assert httpx.post(f"{running.url}/v1/chat/completions", json=question(), timeout=SECONDS).status_code == 200
        assert not [line for line in running.lines if "Traceback" in line]
        assert running.workers == [worker]  # none crashed


def peak(pid: int) -> int:
    """The most memory that a process had, in bytes."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = sorted({"prompt", "input", "instructions", "guided_json", *ChatRequest.model_fields})
ROLES = ["system", "developer", "user", "assistant", "tool", "function", "\x00"]
TYPES = ["object", "array", "string", "integer", "number", "null", "boolean", "x"]
leaves = {
    "type": st.sampled_from(TYPES),
    "enum": st.lists(scalars, max_size=3),
    "const": scalars,
    "pattern": st.text(string.ascii_letters + "()[]{}*+?|^$.\\0123", max_size=12),
    "minLength": counts,
    "maxItems": counts,
    "$ref": st.sampled_from(["#", "#/x", "http://a/b"]),
}


def wrapped(inner: Any) -> Any:
    """A schema with others inside."""
    properties, several = st.dictionaries(st.text(max_size=5), inner, max_size=3), st.lists(inner, max_size=3)
    required = st.lists(st.text(max_size=5), max_size=3)
    more = {"properties": properties, "items": inner, "anyOf": several, "required": required, **leaves}
    return st.fixed_dictionaries({}, optional=more)


schemas = st.recursive(st.fixed_dictionaries({}, optional=leaves), wrapped, max_leaves=5)
urls = damaged_images.map(lambda data: "data:image/png;base64," + base64.b64encode(data).decode()) | st.text(
    max_size=30
)
parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=30)}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": urls}) | urls}),
    anything,
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES), "content": st.text(max_size=30) | st.lists(parts, max_size=3) | anything},
    optional={"tool_calls": anything, "tool_call_id": anything, "name": anything},
)
tools = st.fixed_dictionaries(
    {"type": st.sampled_from(["function", "x"])},
    optional={
        "function": st.fixed_dictionaries({"name": st.text(string.ascii_letters, max_size=8), "parameters": schemas})
    },
)
LIKELY: dict[str, Any] = {
    "messages": st.lists(messages, max_size=4),
    "tools": st.lists(tools, max_size=2),
    "tool_choice": st.sampled_from(["none", "auto", "required"]),
    "stream": st.booleans(),
    "n": st.integers(0, 3),
    "response_format": st.fixed_dictionaries(
        {
            "type": st.just("json_schema"),
            "json_schema": st.fixed_dictionaries({"name": st.just("a"), "schema": schemas}),
        }
    ),
    "grammar": st.text('root:=|()[]*+?"ab \n', max_size=30).map(lambda text: f"root ::= {text}"),
}
plain = st.fixed_dictionaries({"messages": st.just(question()["messages"])})
bodies = st.builds(
    lambda base, likely, odd: {**base, **likely, **odd},
    plain,
    st.fixed_dictionaries({}, optional=LIKELY),
    st.dictionaries(st.sampled_from(FIELDS), anything, max_size=2),
)


def answered_well(reply: httpx.Response) -> None:
    """A status that is meant, and in the error body one sentence."""
    assert reply.status_code < 500 or reply.status_code == 503, reply.text
    assert "Traceback" not in reply.text
    assert '"internal_error"' not in reply.text
    if reply.status_code >= 400:
        assert is_sentence(reply.json()["error"]["message"]), reply.text


@drawn(200)
@given(body=bodies, path=st.sampled_from(["chat/completions"] * 6 + ["completions", "responses"]))
def test_a_body_is_answered_or_refused(server: Served, body: Any, path: str) -> None:
    data = json.dumps(body).encode()
    head = {"content-type": "application/json"}
    answered_well(httpx.post(f"{server.url}/v1/{path}", content=data, headers=head, timeout=SECONDS))


@drawn(60)
@given(data=damaged(json.dumps(question()).encode()) | st.binary(max_size=40), part=damaged_images)
def test_bytes_that_are_no_body_and_images_that_are_none(server: Served, data: bytes, part: bytes) -> None:
    head = {"content-type": "application/json"}
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        answered_well(client.post("/v1/chat/completions", content=data, headers=head))
        answered_well(client.post("/v1/chat/completions", json=question(as_url(part))))
