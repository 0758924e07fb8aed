"""openai-agents: an agent with a tool looks at an image and goes on, over both of OpenAI's APIs."""

import asyncio
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from asked import ANSWER, IMAGE, QUESTION, V1
from openai import AsyncOpenAI
from pydantic import BaseModel


class Seen(BaseModel):
    """What is wanted."""

    colour: Literal["red", "blue"]


@function_tool
def paint(colour: Literal["red", "blue"]) -> str:
    """Paint in a colour."""
    return f"painted {colour}"


async def main() -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=V1, api_key="none", max_retries=0)
    content = [{"type": "input_image", "image_url": IMAGE, "detail": "auto"}, {"type": "input_text", "text": QUESTION}]
    asked = [{"role": "user", "content": content}]
    settings = ModelSettings(temperature=0, max_tokens=80)
    forced = ModelSettings(temperature=0, max_tokens=80, tool_choice="required")
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind("any", client)
        agent = Agent("plain", model=model, model_settings=settings)
        first = await Runner.run(agent, asked)
        assert first.final_output == ANSWER, first.final_output
        again = await Runner.run(agent, [*first.to_input_list(), {"role": "user", "content": QUESTION}])
        assert again.final_output
        streamed = Runner.run_streamed(agent, asked)
        async for _ in streamed.stream_events():
            pass
        assert streamed.final_output == ANSWER
        typed = await Runner.run(Agent("typed", model=model, model_settings=settings, output_type=Seen), asked)
        assert typed.final_output.colour in {"red", "blue"}
        offered = await Runner.run(Agent("offered", model=model, model_settings=settings, tools=[paint]), asked)
        assert offered.final_output
        called = await Runner.run(Agent("forced", model=model, model_settings=forced, tools=[paint]), asked)
        assert any(item.type == "tool_call_output_item" for item in called.new_items)


asyncio.run(main())
