"""Settings of one answer: sampling, limits, stops, and the guard's switch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_STOP, MAX_LOGIT_BIAS, MAX_SCHEMA = 64, 65_536, 2**20
"""Bounds on numbers of stop strings and biased tokens, and on characters of a schema; servers set lower limits."""


class SamplingParams(BaseModel):
    """Settings of one answer; unknown names are refused.

    A temperature of 0 is greedy. `max_tokens` of None takes the engine's default, `max_seconds` of None is no limit.
    `seed` of None draws one. `max_thinking_tokens` of 0 is an answer without reasoning. `logprobs` asks for the log
    probabilities of that many most likely tokens at each position (0: of the chosen one alone; None: none).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(0.2, ge=0.0, le=10.0)
    top_k: int = Field(40, ge=0, description="0 switches it off")
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    min_p: float = Field(0.05, ge=0.0, le=1.0)
    repeat_penalty: float = Field(1.0, gt=0.0, le=10.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    penalty_last_n: int = Field(64, ge=-1, le=65536, description="tokens looked back at; -1 is the context")
    logit_bias: dict[int, float] = Field(default_factory=dict, max_length=MAX_LOGIT_BIAS)
    seed: int | None = Field(None, ge=0, le=2**32 - 2)
    max_tokens: int | None = Field(None, ge=1)
    max_seconds: float | None = Field(None, gt=0.0)
    thinking: bool | None = Field(None, description="None leaves it to the template")
    max_thinking_tokens: int | None = Field(None, ge=0)
    stop: tuple[Annotated[str, Field(max_length=1000)], ...] = Field((), max_length=MAX_STOP)
    ignore_eos: bool = False
    guard: bool = True
    json_schema: str | None = Field(None, max_length=MAX_SCHEMA, description="a JSON schema as text")
    grammar: str | None = Field(None, max_length=MAX_SCHEMA, description="a GBNF grammar as text")
    logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _one_shape(self) -> SamplingParams:
        if self.json_schema is not None and self.grammar is not None:
            raise ValueError("json_schema and grammar cannot be used together: give one of them")
        if any(not text for text in self.stop):
            raise ValueError("a stop string is empty: leave it out")
        return self


FinishReason = Literal["stop", "length", "cancelled"]
