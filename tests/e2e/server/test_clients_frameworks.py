"""LangChain's ChatOpenAI and LiteLLM against a running server."""

import base64
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pytest

# Warnings of these packages' own making are not ours to fix.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("leftovers")]

DEMO = Path(str(files("opsin.models"))) / "demo"
IMAGE = "data:image/png;base64," + base64.b64encode((DEMO / "shapes.png").read_bytes()).decode()
QUESTION, ANSWER = "What do you see at the top left?", "a small pink ring."
CONTENT: Any = [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": QUESTION}]


def test_langchain_asks_and_streams(server: Any) -> None:
    langchain_openai = pytest.importorskip("langchain_openai", reason="tested where it is installed")
    from langchain_core.messages import HumanMessage, SystemMessage

    chat = langchain_openai.ChatOpenAI(base_url=server.v1, api_key="none", model="any", temperature=0, max_retries=0)
    answer = chat.invoke([HumanMessage(content=CONTENT)])
    assert answer.content == ANSWER
    assert answer.usage_metadata["output_tokens"] > 0
    chunks = list(chat.stream([HumanMessage(content=CONTENT)]))
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    assert len(chunks) > 2
    assert chat.invoke([SystemMessage(content="Be brief."), HumanMessage(content=CONTENT)]).content


def test_langchain_calls_a_tool(server: Any) -> None:
    langchain_openai = pytest.importorskip("langchain_openai", reason="tested where it is installed")
    chat = langchain_openai.ChatOpenAI(
        base_url=server.v1, api_key="none", model="any", temperature=0, max_tokens=200, max_retries=0
    )

    def paint(colour: Literal["red", "blue"]) -> str:
        """Paint in a colour."""
        return colour

    answer = chat.bind_tools([paint], tool_choice="any").invoke("Paint.")
    assert [call["name"] for call in answer.tool_calls] == ["paint"]


def test_litellm_asks_and_streams(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without it the package fetches a price list when it is imported.
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="tested where it is installed")
    asked = {
        "model": "openai/any",
        "api_base": server.v1,
        "api_key": "none",
        "temperature": 0,
        "messages": [{"role": "user", "content": CONTENT}],
    }
    assert litellm.completion(**asked).choices[0].message.content == ANSWER
    chunks = list(litellm.completion(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
