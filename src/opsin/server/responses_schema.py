"""What may stand in a request to the Responses API; everything else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from opsin.server.schema import (
    NAME,
    CalledFunction,
    Common,
    FormatIn,
    FunctionIn,
    ImagePartIn,
    ImageUrl,
    JsonSchema,
    MessageIn,
    NamedFunction,
    NamedTool,
    ObjectFormat,
    PartIn,
    SchemaFormat,
    Strict,
    TemplateSwitches,
    TextFormat,
    TextPartIn,
    ToolCallIn,
    ToolIn,
)


class InputText(Strict):
    """Text of the user, or of an older answer."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(None, max_length=0)
    logprobs: list[Any] | None = None


class InputImage(Strict):
    """A picture by its address; files kept on a server there are none of."""

    type: Literal["input_image"]
    image_url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = None
    file_id: None = None


def _as_input_text(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


InputPart = Annotated[InputText | InputImage, Field(discriminator="type")]
InputContent = Annotated[list[InputPart], BeforeValidator(_as_input_text, json_schema_input_type=str | list[InputPart])]


class InputMessage(Strict):
    """A message; older answers may be sent back as they came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent
    id: str | None = None
    status: str | None = None


class InputCall(Strict):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputCallOutput(Strict):
    """What a function gave back."""

    type: Literal["function_call_output"]
    call_id: str
    output: InputContent
    id: str | None = None
    status: str | None = None


class ReasoningText(Strict):
    """Thoughts as text."""

    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Strict):
    """The thoughts before an older answer; chat templates leave them out, so they are only taken."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] | None = Field(None, max_length=0)
    content: list[ReasoningText] | None = None
    status: str | None = None
    encrypted_content: None = None


def _kind(value: Any) -> str:
    kind = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", "message")
    return str(kind)


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputCallOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class FlatTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatNamedTool(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class FlatSchemaFormat(Strict):
    """JSON that keeps to a schema."""

    type: Literal["json_schema"]
    name: str = Field("answer", pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextIn(Strict):
    """How the text is to look."""

    format: Annotated[TextFormat | ObjectFormat | FlatSchemaFormat, Field(discriminator="type")] | None = None


class ResponsesRequest(Common):
    """POST /v1/responses. Nothing is kept: a conversation is sent whole each time."""

    input: Annotated[list[InputItem], BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem])] = Field(
        min_length=1
    )
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextIn | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    truncation: Literal["disabled"] | None = None
    previous_response_id: None = None
    background: Literal[False] | None = None
    include: list[Any] | None = Field(None, max_length=0)
    seed: int | None = None
    thinking: bool | None = None
    chat_template_kwargs: TemplateSwitches | None = None

    def messages(self) -> list[MessageIn]:
        """The conversation in the words of chat completions."""
        found = [MessageIn(role="system", content=self.instructions)] if self.instructions else []  # type: ignore[arg-type]
        for item in self.input:
            if isinstance(item, InputMessage):
                found.append(MessageIn(role=item.role, content=_parts(item.content)))
            elif isinstance(item, InputCallOutput):
                found.append(MessageIn(role="tool", content=_parts(item.output), tool_call_id=item.call_id))
            elif isinstance(item, InputCall):
                call = ToolCallIn(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
                if found and found[-1].role == "assistant":
                    found[-1].tool_calls = [*(found[-1].tool_calls or ()), call]
                else:
                    found.append(MessageIn(role="assistant", tool_calls=[call]))
        return found

    def functions(self) -> list[ToolIn]:
        """The tools in the words of chat completions."""
        return [
            ToolIn(type="function", function=FunctionIn(**tool.model_dump(exclude={"type"})))
            for tool in self.tools or ()
        ]

    def choice(self) -> str | NamedTool | None:
        """The choice of a tool in the words of chat completions."""
        if not isinstance(self.tool_choice, FlatNamedTool):
            return self.tool_choice
        return NamedTool(type="function", function=NamedFunction(name=self.tool_choice.name))

    def format(self) -> FormatIn | None:
        """The format in the words of chat completions."""
        wanted = None if self.text is None else self.text.format
        if not isinstance(wanted, FlatSchemaFormat):
            return wanted
        return SchemaFormat(type="json_schema", json_schema=JsonSchema(schema=wanted.schema_))


def _parts(content: list[InputPart]) -> list[PartIn]:
    return [
        TextPartIn(type="text", text=part.text)
        if isinstance(part, InputText)
        else ImagePartIn(type="image_url", image_url=ImageUrl(url=part.image_url, detail=part.detail))
        for part in content
    ]
