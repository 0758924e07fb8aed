"""instructor: typed answers about an image, by tools and by a JSON schema, whole and in pieces."""

from typing import Literal

import instructor
from asked import CONTENT, V1
from openai import OpenAI
from pydantic import BaseModel


class Seen(BaseModel):
    """What is wanted."""

    colour: Literal["red", "blue"]


for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(OpenAI(base_url=V1, api_key="none", max_retries=0), mode=mode)
    options = {"model": "any", "messages": [{"role": "user", "content": CONTENT}], "temperature": 0, "max_tokens": 80}
    seen = client.chat.completions.create(response_model=Seen, max_retries=1, **options)
    assert seen.colour in {"red", "blue"}
    *_, last = client.chat.completions.create_partial(response_model=Seen, max_retries=1, **options)
    assert last.colour in {"red", "blue"}
