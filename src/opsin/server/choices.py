"""A response format of Opsin's own: the answer is one of a list, with the probability of each label."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from opsin.core.choice import MAX_CHOICES
from opsin.server.errors import BadField


class ChoicesFormat(BaseModel):
    """One of `choices`, a whole number of a `scale` such as "1-5", or with `boolean` yes or no.

    With `reasons` the model answers in its own words before; null: where it hardly begins an answer with a label.
    """

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    type: Literal["choices"]
    choices: list[str] | None = Field(None, min_length=2, max_length=MAX_CHOICES)
    scale: str | None = None
    boolean: Literal[True] | None = None
    reasons: bool | None = None


def labels_of(wanted: ChoicesFormat) -> dict[str, Any]:
    """The fields of SamplingParams that it asks for. Raises BadField."""
    asked = wanted.model_dump(exclude={"type", "reasons"}, exclude_none=True)
    if len(asked) != 1:
        given = " and ".join(asked) or "none of them"
        raise BadField(f"response_format: give choices, scale or boolean, and {given} is given.", "response_format")
    return {**asked, "reasons": wanted.reasons}


def check_alone(n: int | None, *, tools: bool, schema: object = None) -> None:
    """Raise BadField for what cannot be honoured beside labels."""
    if schema is not None:
        raise BadField("json_schema cannot be used with choices: leave one of them out.", "json_schema")
    if n is not None and n > 1:
        raise BadField(f"n: {n} answers of choices would all be the same: leave n out.", "n")
    if tools:
        raise BadField("tools cannot be used with choices: leave one of them out, or set tool_choice to none.", "tools")
