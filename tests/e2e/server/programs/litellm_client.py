"""LiteLLM: a tool that must be called, and its result; its own second turn."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no list of prices from the network

import litellm
from asked import ANSWER, CONTENT, QUESTION, V1

PARAMETERS = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
PAINT = {"type": "function", "function": {"name": "paint", "parameters": PARAMETERS}}
options = {"model": "openai/any", "api_base": V1, "api_key": "none", "temperature": 0, "max_tokens": 80}
asked, again = {"role": "user", "content": CONTENT}, {"role": "user", "content": QUESTION}

first = litellm.completion(messages=[asked], **options).choices[0].message
assert first.content == ANSWER, first
for message in (first, first.model_dump()):
    assert litellm.completion(messages=[asked, message, again], **options).choices[0].message.content
assert litellm.completion(messages=[asked], tools=[PAINT], **options).choices
called = litellm.completion(messages=[asked], tools=[PAINT], tool_choice="required", **options).choices[0].message
result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "painted"}
assert litellm.completion(messages=[asked, called, result], tools=[PAINT], **options).choices
