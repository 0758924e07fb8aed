"""pydantic-ai: an image, a stream, a typed answer, a tool, and a second turn, over both of OpenAI's APIs."""

from typing import Literal

from asked import ANSWER, DATA, QUESTION, V1
from pydantic import BaseModel
from pydantic_ai import Agent, BinaryContent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Seen(BaseModel):
    """What is wanted."""

    colour: Literal["red", "blue"]


def paint(colour: Literal["red", "blue"]) -> str:
    """Paint in a colour."""
    return colour


provider = OpenAIProvider(base_url=V1, api_key="none")
settings = {"temperature": 0, "max_tokens": 80}
asked = [BinaryContent(data=DATA, media_type="image/png"), QUESTION]
for model in (OpenAIChatModel("any", provider=provider), OpenAIResponsesModel("any", provider=provider)):
    agent = Agent(model, model_settings=settings)
    first = agent.run_sync(asked)
    assert first.output == ANSWER, first.output
    assert agent.run_sync(QUESTION, message_history=first.all_messages()).output
    for output in (Seen, NativeOutput(Seen)):
        assert Agent(model, output_type=output, model_settings=settings).run_sync(asked).output.colour
    # The choice is left to the model, whose template knows no tools.
    assert Agent(model, tools=[paint], model_settings=settings).run_sync(asked).output
    stream = agent.run_stream_sync(asked)
    *_, text = stream.stream_text(debounce_by=None)
    assert text == ANSWER
