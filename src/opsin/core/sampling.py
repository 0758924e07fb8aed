"""Settings of one answer: sampling, limits, stops, and the guard's switch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from opsin.core.settings import MAX_ANSWER_TOKENS

MAX_STOP, MAX_LOGIT_BIAS, MAX_SCHEMA = 64, 65_536, 2**20
"""Bounds on numbers of stop strings and biased tokens, and on characters of a schema; servers set lower limits."""
MAX_TOKENS_HELP = f"longest answer in tokens (default: {MAX_ANSWER_TOKENS:,})"
MAX_SECONDS_HELP = "longest time for an answer in seconds, waiting included"
GUARD_HELP = "end answers that repeat themselves without end"

FinishReason = Literal["stop", "length", "cancelled"]


class SamplingParams(BaseModel):
    """Settings of one answer; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(0.2, ge=0.0, le=10.0, description="randomness; 0 always takes the most likely token")
    top_k: int = Field(40, ge=0, description="0 switches it off")
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    min_p: float = Field(0.05, ge=0.0, le=1.0)
    repeat_penalty: float = Field(1.0, gt=0.0, le=10.0)
    presence_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    penalty_last_n: int = Field(64, ge=-1, le=65536, description="tokens looked back at; -1 is the context")
    logit_bias: dict[int, float] = Field(default_factory=dict, max_length=MAX_LOGIT_BIAS)
    seed: int | None = Field(None, ge=0, le=2**32 - 2, description="number that makes a random answer repeatable")
    max_tokens: int | None = Field(None, ge=1, description=MAX_TOKENS_HELP)
    max_seconds: float | None = Field(None, gt=0.0, description=MAX_SECONDS_HELP)
    thinking: bool | None = Field(None, description="reasoning before the answer, for models that can")
    max_thinking_tokens: int | None = Field(None, ge=0, description="longest reasoning in tokens; 0: none at all")
    stop: tuple[Annotated[str, Field(max_length=1000)], ...] = Field((), max_length=MAX_STOP)
    ignore_eos: bool = False
    guard: bool = Field(True, description=GUARD_HELP)
    json_schema: str | None = Field(None, max_length=MAX_SCHEMA, description="a JSON schema as text")
    grammar: str | None = Field(None, max_length=MAX_SCHEMA, description="a GBNF grammar as text")
    logprobs: int | None = Field(None, ge=0, le=20, description="most likely tokens to report; 0: the chosen alone")

    @model_validator(mode="after")
    def _one_shape(self) -> SamplingParams:
        if self.json_schema is not None and self.grammar is not None:
            raise ValueError("json_schema and grammar cannot be used together: give one of them")
        if "" in self.stop:
            raise ValueError("a stop string is empty: leave it out")
        return self
