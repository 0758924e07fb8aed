"""The LiteLLM proxy in front of the server, asked by OpenAI's package; each answer is sent back whole."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from asked import ANSWER, CONTENT, IMAGE, QUESTION, V1
from openai import APIConnectionError, OpenAI
from pydantic import BaseModel

START_SECONDS = 120
CONFIG = f"""
model_list:
  - model_name: here
    litellm_params: {{model: openai/any, api_base: "{V1}", api_key: none}}
litellm_settings: {{num_retries: 0}}
"""
PARAMETERS = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
PAINT = {"type": "function", "function": {"name": "paint", "parameters": PARAMETERS}}
OPTIONS = {"model": "here", "temperature": 0, "max_tokens": 80}
ASKED, AGAIN = {"role": "user", "content": CONTENT}, {"role": "user", "content": QUESTION}


class Seen(BaseModel):
    """What is wanted."""

    colour: Literal["red", "blue"]


def forms(message):
    return message, message.model_dump(), message.model_dump(exclude_none=True)


def chat(client: OpenAI) -> None:
    first = client.chat.completions.create(messages=[ASKED], **OPTIONS)
    assert first.choices[0].message.content == ANSWER, first
    assert first.usage.prompt_tokens > 0
    with client.chat.completions.stream(messages=[ASKED], stream_options={"include_usage": True}, **OPTIONS) as stream:
        deltas = [event for event in stream if event.type == "content.delta"]
        streamed = stream.get_final_completion()
    assert streamed.choices[0].message.content == ANSWER, streamed
    assert len(deltas) > 1
    assert streamed.usage.completion_tokens == first.usage.completion_tokens
    parsed = client.chat.completions.parse(messages=[ASKED], response_format=Seen, **OPTIONS)
    assert parsed.choices[0].message.parsed.colour in {"red", "blue"}
    for answer in (first, streamed, parsed):
        for message in forms(answer.choices[0].message):
            again = client.chat.completions.create(messages=[ASKED, message, AGAIN], **OPTIONS)
            assert again.choices[0].message.content


def tools(client: OpenAI) -> None:
    offered = client.chat.completions.create(messages=[ASKED], tools=[PAINT], tool_choice="auto", **OPTIONS)
    assert offered.choices[0].message.content or offered.choices[0].message.tool_calls
    for choice in ("required", {"type": "function", "function": {"name": "paint"}}):
        forced = {"messages": [ASKED], "tools": [PAINT], "tool_choice": choice, **OPTIONS}
        with client.chat.completions.stream(**forced) as stream:
            streamed = stream.until_done().get_final_completion()
        for answer in (client.chat.completions.create(**forced), streamed):
            assert answer.choices[0].finish_reason == "tool_calls"
            (call,) = answer.choices[0].message.tool_calls
            assert Seen.model_validate_json(call.function.arguments)
            result = {"role": "tool", "tool_call_id": call.id, "content": "painted"}
            for message in forms(answer.choices[0].message):
                after = client.chat.completions.create(messages=[ASKED, message, result], tools=[PAINT], **OPTIONS)
                assert after.choices


def responses(client: OpenAI) -> None:
    content = [{"type": "input_image", "image_url": IMAGE}, {"type": "input_text", "text": QUESTION}]
    asked = {"role": "user", "content": content}
    options = {"model": "here", "temperature": 0, "max_output_tokens": 80}
    first = client.responses.create(input=[asked], **options)
    assert first.output_text == ANSWER, first
    assert client.responses.create(input=[asked, *first.output, AGAIN], **options).output_text
    with client.responses.stream(input=[asked], **options) as stream:
        assert stream.get_final_response().output_text == ANSWER


def ready(client: OpenAI, proxy: subprocess.Popen) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        with suppress(APIConnectionError):
            assert [model.id for model in client.models.list()] == ["here"]
            return
        assert proxy.poll() is None, "the proxy ended"
        assert time.monotonic() < end, "the proxy is not ready"
        time.sleep(0.2)


with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
    log, config = Path(folder, "log"), Path(folder, "config.yaml")
    config.write_text(CONFIG, encoding="utf-8")
    free.bind(("127.0.0.1", 0))
    port, key = free.getsockname()[1], f"sk-{secrets.token_urlsafe(24)}"
    free.close()
    local = ("MODEL_COST_MAP", "ANTHROPIC_BETA_HEADERS", "AUTOROUTER_PRESETS", "BLOG_POSTS", "POLICY_TEMPLATES")
    quiet = {f"LITELLM_LOCAL_{name}": "True" for name in local}  # nothing is fetched from the network
    command = [
        Path(sys.executable).with_name("litellm"),
        "--config",
        config,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with log.open("wb") as out:
        proxy = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            cwd=folder,
            env={**os.environ, **quiet, "LITELLM_MASTER_KEY": key, "LITELLM_TELEMETRY_DISABLED": "True"},
        )
    try:
        with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60) as client:
            ready(client, proxy)
            for part in (chat, tools, responses):
                part(client)
    except BaseException:
        print(log.read_text(encoding="utf-8", errors="replace")[-6000:], file=sys.stderr)
        raise
    finally:
        proxy.terminate()
        proxy.wait(30)
