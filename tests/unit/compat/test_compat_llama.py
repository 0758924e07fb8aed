"""llama-cpp-python's programs on the engine with the fake backend."""

import base64
import gc
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opsin.compat import (
    Llama,
    LlamaGrammar,
    Llava15ChatHandler,
    MoondreamChatHandler,
    MTMDChatHandler,
    NanoLlavaChatHandler,
)
from opsin.compose import Runtime
from opsin.core.backend import BackendLimits
from opsin.core.errors import BadParameter, BadPrompt, ModelNotFound
from opsin.core.request import SamplingParams
from opsin.core.settings import EngineSettings
from opsin.engine import Engine
from opsin.prompt import PromptBuilder, TemplateSource
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import TURN_TEXT

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def data_uri(colour: str = "red") -> str:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def asked(*urls: str, text: str = "What's in this image?") -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    return [{"role": "user", "content": parts + [{"type": "image_url", "image_url": {"url": url}} for url in urls]}]


class World:
    """What `Llama` opened, and with what."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.answer = "a red square."
        self.settings: EngineSettings
        self.opened: tuple[Any, Any]
        self.backends: list[FakeBackend] = []

    def reply(self, prompt: str) -> str:
        self.prompts.append(prompt)
        return self.answer

    def open(self, model: Any, mmproj: Any, settings: EngineSettings, *, template: str | None = None) -> Runtime:
        self.settings, self.opened = settings, (model, mmproj)
        backend = FakeBackend(self.reply, limits=BackendLimits(settings.ctx or 512, 64, 8, 259, 4, settings.ctx or 512))
        self.backends.append(backend)
        sampler = backend.sampler

        def spy(params: SamplingParams, seed: int, compiled: object = None) -> Any:
            self.params.append(params)
            return sampler(params, seed, compiled)

        backend.sampler = spy  # type: ignore[method-assign]
        text = (template or PLAIN) + f"{{{{- '{TURN_TEXT}' -}}}}"
        source = TemplateSource(text, "fake", "fake", None, "", "", frozenset({TURN_TEXT}))
        return Runtime(Engine(lambda: backend), PromptBuilder(source), is_demo=False, setup="fake")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr("opsin.compat.llama.open_runtime", world.open)
    return world


@pytest.fixture
def projector(tmp_path: Path) -> str:
    path = tmp_path / "mmproj.bin"
    path.write_bytes(b"GGUF")
    return str(path)


@pytest.fixture
def open_llama(world: World, projector: str) -> Iterator[Callable[..., Llama]]:
    opened: list[Llama] = []

    def make(handler: type[MTMDChatHandler] = Llava15ChatHandler, **options: Any) -> Llama:
        opened.append(Llama(model_path="llava.gguf", chat_handler=handler(clip_model_path=projector), **options))
        return opened[-1]

    yield make
    for llm in opened:
        llm.close()


def test_the_readmes_first_example(world: World, open_llama: Callable[..., Llama], projector: str) -> None:
    llm = open_llama(n_ctx=2048)
    response = llm.create_chat_completion(
        messages=[
            {"role": "system", "content": "You are an assistant who perfectly describes images."},
            *asked(data_uri()),
        ]
    )
    assert world.opened == ("llava.gguf", projector)
    assert world.settings.ctx == llm.n_ctx() == 2048
    assert set(response) == {"id", "object", "created", "model", "choices", "usage"}
    assert response["object"] == "chat.completion"
    assert response["id"].startswith("chatcmpl-")
    assert response["model"] == "llava.gguf"
    assert response["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "a red square."},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    usage = response["usage"]
    assert usage["completion_tokens"] == len("a red square.")
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    json.dumps(response)


def test_the_readmes_second_example_reads_the_text_beside_the_message(open_llama: Callable[..., Llama]) -> None:
    response = open_llama(MoondreamChatHandler).create_chat_completion(messages=asked(data_uri()))
    assert response["choices"][0]["text"] == "a red square."
    with pytest.raises(KeyError):
        response["choices"][0]["texts"]


def test_a_stream_has_the_peers_chunks(open_llama: Callable[..., Llama]) -> None:
    chunks = list(open_llama().create_chat_completion(messages=asked(data_uri()), stream=True, model="mine"))
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == len({c["created"] for c in chunks}) == 1
    assert {c["model"] for c in chunks} == {"mine"}
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant"}
    assert deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "a red square."
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_leaving_a_stream_early_frees_the_engine(world: World, open_llama: Callable[..., Llama]) -> None:
    world.answer = "x" * 400
    llm = open_llama(n_ctx=512)
    chunks = llm.create_chat_completion(messages=asked(data_uri()), stream=True)
    next(chunks)
    chunks.close()
    world.answer = "next"
    assert llm.create_chat_completion(messages=asked(data_uri()))["choices"][0]["text"] == "next"
    llm.close()
    assert world.backends[0].open_handles == 0


def test_an_answer_cut_by_its_limit_says_length(open_llama: Callable[..., Llama]) -> None:
    response = open_llama().create_chat_completion(messages=asked(data_uri()), max_tokens=3)
    assert response["choices"][0]["finish_reason"] == "length"
    assert response["choices"][0]["message"]["content"] == "a r"


def test_sampling_options_arrive(world: World, open_llama: Callable[..., Llama]) -> None:
    llm = open_llama(seed=7, last_n_tokens_size=32)
    llm.create_chat_completion(
        messages=asked(data_uri()),
        temperature=0.7,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        stop="square",
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repeat_penalty=1.1,
        logit_bias={"65": -1.0},
        typical_p=1.0,
        mirostat_tau=3.0,
        guard=False,
    )
    params = world.params[-1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.7, 0.5, 0, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repeat_penalty) == (0.1, 0.2, 1.1)
    assert (params.stop, params.seed, params.penalty_last_n, params.guard) == (("square",), 7, 32, False)
    assert params.logit_bias == {65: -1.0}
    llm.create_chat_completion(messages=asked(data_uri()), seed=9, stop=["a", "b"], max_tokens=-1)
    assert (world.params[-1].seed, world.params[-1].stop, world.params[-1].max_tokens) == (9, ("a", "b"), None)
    llm.create_chat_completion(messages=asked(data_uri()), seed=-1)
    assert world.params[-1].seed is None


def test_log_probabilities_have_the_peers_shape(open_llama: Callable[..., Llama]) -> None:
    llm = open_llama()
    whole = llm.create_chat_completion(messages=asked(data_uri()), logprobs=True, top_logprobs=1)
    content = whole["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == "a red square."
    assert content[0] == {
        "token": "a",
        "bytes": None,
        "logprob": 0.0,
        "top_logprobs": [{"token": "a", "bytes": None, "logprob": 0.0}],
    }
    chunks = list(llm.create_chat_completion(messages=asked(data_uri()), logprobs=True, stream=True))
    streamed = [one for c in chunks if c["choices"][0]["logprobs"] for one in c["choices"][0]["logprobs"]["content"]]
    assert [one["token"] for one in streamed] == [one["token"] for one in content]


@pytest.mark.parametrize(
    ("options", "schema"),
    [
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        ({"response_format": {"type": "json_object", "schema": {"type": "array"}}}, {"type": "array"}),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}}}, {"type": "null"}),
        ({"grammar": LlamaGrammar.from_json_schema('{"type": "string"}')}, {"type": "string"}),
    ],
)
def test_response_formats_become_schemas(
    world: World, open_llama: Callable[..., Llama], options: dict[str, Any], schema: dict[str, Any]
) -> None:
    open_llama().create_chat_completion(messages=asked(data_uri()), **options)
    assert world.params[-1].json_schema is not None
    assert json.loads(world.params[-1].json_schema) == schema


def test_grammars_of_the_peer_are_read(world: World, open_llama: Callable[..., Llama], tmp_path: Path) -> None:
    class Theirs:
        _grammar = 'root ::= "a"'

    (tmp_path / "g.gbnf").write_text('root ::= "b"')
    llm = open_llama()
    grammars = [Theirs(), LlamaGrammar.from_file(tmp_path / "g.gbnf"), 'root ::= "c"']
    for letter, grammar in zip("abc", grammars, strict=True):
        llm.create_chat_completion(messages=asked(data_uri()), grammar=grammar)
        assert world.params[-1].grammar == f'root ::= "{letter}"'
    with pytest.raises(BadParameter, match="grammar is a int"):
        llm.create_chat_completion(messages=asked(data_uri()), grammar=3)


FUNCTION = {"name": "see", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}


def test_a_named_tool_gets_its_arguments(world: World, open_llama: Callable[..., Llama]) -> None:
    world.answer = '{"what": "square"}'
    tools = [{"type": "function", "function": FUNCTION}]
    choice = {"type": "function", "function": {"name": "see"}}
    llm = open_llama()
    response = llm.create_chat_completion(messages=asked(data_uri()), tools=tools, tool_choice=choice)
    message = response["choices"][0]["message"]
    assert response["choices"][0]["finish_reason"] == "tool_calls"
    assert message["content"] is None
    assert message["function_call"] == {"name": "see", "arguments": '{"what": "square"}'}
    assert message["tool_calls"][0]["function"] == message["function_call"]
    assert json.loads(world.params[-1].json_schema or "") == FUNCTION["parameters"]
    chunks = list(
        llm.create_chat_completion(
            messages=asked(data_uri()), functions=[FUNCTION], function_call={"name": "see"}, stream=True
        )
    )
    calls = [c["choices"][0]["delta"]["tool_calls"][0] for c in chunks[1:-1]]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"what": "square"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_that_cannot_be_kept_are_refused(open_llama: Callable[..., Llama]) -> None:
    tools = [{"type": "function", "function": FUNCTION}]
    llm = open_llama()
    with pytest.raises(BadPrompt, match="knows no tools"):
        llm.create_chat_completion(messages=asked(data_uri()), tools=tools)
    with pytest.raises(BadParameter, match="'hear', which is not among the tools"):
        llm.create_chat_completion(messages=asked(data_uri()), tools=tools, tool_choice={"function": {"name": "hear"}})
    with pytest.raises(BadParameter, match="required"):
        llm.create_chat_completion(messages=asked(data_uri()), tools=tools, tool_choice="required")
    assert llm.create_chat_completion(messages=asked(data_uri()), tools=tools, tool_choice="none")["choices"]


def test_llava_reads_images_first_and_texts_as_one(world: World, open_llama: Callable[..., Llama]) -> None:
    message = asked(data_uri("red"), data_uri("blue"), text="one")
    message[0]["content"].append({"type": "text", "text": " two"})
    open_llama().create_chat_completion(messages=message)
    head, _, text = world.prompts[0].rpartition(">")
    assert text == "one two" + TURN_TEXT
    assert head.startswith("[user]<")
    assert head.count("<") == 8


def test_other_families_read_images_where_they_stand(world: World, open_llama: Callable[..., Llama]) -> None:
    open_llama(MTMDChatHandler).create_chat_completion(messages=asked(data_uri(), text="first"))
    assert "first<" in world.prompts[0]


def test_moondreams_and_nanollavas_own_formats(world: World, open_llama: Callable[..., Llama]) -> None:
    talk = [*asked(data_uri(), text="Q1"), {"role": "assistant", "content": "A1"}, {"role": "user", "content": "Q2"}]
    open_llama(MoondreamChatHandler).create_chat_completion(messages=talk)
    prompt = world.prompts[0]
    assert prompt[prompt.rindex(">") + 1 :] == f"\n\nQuestion: Q1\n\nAnswer: A1\n\nQuestion: Q2\n\nAnswer:{TURN_TEXT}"
    world.prompts.clear()
    open_llama(NanoLlavaChatHandler).create_chat_completion(messages=talk)
    prompt = world.prompts[0]
    assert "<|im_start|>system\nAnswer the question<|im_end|><|im_start|>user\n<" in prompt
    assert prompt.endswith(
        ">\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|>"
        f"<|im_start|>assistant\n{TURN_TEXT}"
    )


def test_images_are_read_from_data_files_and_what_a_subclass_makes_of_an_address(
    open_llama: Callable[..., Llama], tmp_path: Path
) -> None:
    path = tmp_path / "a b.png"
    Image.new("RGB", (8, 6), "red").save(path)

    class Own(Llava15ChatHandler):
        def load_image(self, image_url: str) -> object:
            assert image_url == "db://7"
            return path.read_bytes()

    for handler, url in ((Llava15ChatHandler, path.as_uri()), (Llava15ChatHandler, str(path)), (Own, "db://7")):
        assert open_llama(handler).create_chat_completion(messages=asked(url))["choices"]
    plain = [{"role": "user", "content": [{"type": "image_url", "image_url": data_uri()}]}]
    assert open_llama().create_chat_completion(messages=plain)["choices"]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user", "content": [{"type": "video"}]}], "type 'video'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "no address"),
        (["hello"], "A message is a str"),
        ([{"role": "robot", "content": "x"}], "robot"),
        ([], "no message"),
    ],
)
def test_messages_of_another_shape_are_refused(
    open_llama: Callable[..., Llama], messages: list[Any], words: str
) -> None:
    with pytest.raises(BadPrompt, match=words):
        open_llama().create_chat_completion(messages=messages)


def test_options_that_change_no_answer_are_taken_and_others_are_mapped(
    world: World, open_llama: Callable[..., Llama]
) -> None:
    open_llama(
        n_ctx=1024,
        n_gpu_layers=-1,
        n_threads=3,
        n_threads_batch=4,
        n_batch=512,
        n_ubatch=256,
        logits_all=True,
        use_mmap=True,
        offload_kqv=True,
        flash_attn=True,
        type_k=8,
        type_v=8,
        chat_format=None,
        verbose=True,
    )
    found = world.settings
    assert (found.ctx, found.gpu_layers, found.threads, found.threads_batch) == (1024, None, 3, 4)
    assert (found.ubatch, found.flash_attention, found.kv_type, found.verbose) == (256, True, "q8_0", True)
    open_llama(n_gpu_layers=0, n_ctx=0)
    assert (world.settings.gpu_layers, world.settings.ctx, world.settings.verbose) == (0, None, False)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lora_path", "x"),
        ("rope_freq_base", 5.0),
        ("embedding", True),
        ("chat_format", "chatml"),
        ("draft_model", object()),
        ("tensor_split", [1, 1]),
        ("type_k", 8),
        ("type_v", 99),
        ("colour", 1),
        ("chat_handler", print),
    ],
)
def test_options_that_would_change_answers_are_refused_by_name(world: World, option: str, value: object) -> None:
    with pytest.raises(BadParameter, match=option):
        Llama("llava.gguf", **{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [("typical_p", 0.9), ("tfs_z", 0.5), ("mirostat_mode", 2), ("logits_processor", [print]), ("colour", 1),
     ("temperature", -1.0), ("response_format", {"type": "xml"})],
)  # fmt: skip
def test_call_options_that_would_change_answers_are_refused_by_name(
    open_llama: Callable[..., Llama], option: str, value: object
) -> None:
    with pytest.raises(BadParameter, match=option):
        open_llama().create_chat_completion(messages=asked(data_uri()), **{option: value})


def test_a_projector_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="clip_model_path"):
        Llava15ChatHandler(clip_model_path=str(tmp_path / "none.bin"))


def test_a_subclass_with_the_peers_format_is_told_so() -> None:
    with pytest.raises(BadParameter, match="CHAT_FORMAT is not read"):
        type("Mine", (Llava15ChatHandler,), {"CHAT_FORMAT": "x"})


def test_the_encoder_stays_on_the_cpu_when_asked(world: World, projector: str) -> None:
    Llama("m.gguf", chat_handler=MTMDChatHandler(projector, use_gpu=False)).close()
    assert world.settings.mmproj_device == "none"


def test_closing_frees_everything_and_twice_does_no_harm(world: World, open_llama: Callable[..., Llama]) -> None:
    llm = open_llama()
    llm.close()
    llm.close()
    assert world.backends[0].closed


def test_a_dropped_llama_is_closed(world: World, projector: str) -> None:
    before = threading.active_count()
    llm = Llama("m.gguf", chat_handler=Llava15ChatHandler(projector))
    assert not world.backends[0].closed
    del llm
    gc.collect()
    assert world.backends[0].closed
    assert threading.active_count() <= before
