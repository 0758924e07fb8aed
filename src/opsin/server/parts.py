"""The parts that messages are made of: text, images, videos and files."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from opsin.core.image_options import Detail, Region, Tiles
from opsin.core.settings import PageList

MAX_PARTS = 1_000
_JPEGS = "data:video/jpeg;base64,"


class Sent(BaseModel):
    """What a client sends: a value that is null is as good as absent; fields that are not known stay apart."""

    model_config = ConfigDict(extra="allow", strict=True, hide_input_in_errors=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else value

    def without_effect(self) -> Iterable[str]:
        """The fields that are known and change nothing here."""
        return ()


class History(Sent):
    """A piece of the conversation. Whatever else a client, or an answer sent back, has there does not matter."""

    model_config = ConfigDict(extra="ignore")


def or_text(make: Callable[[str], Any], accepted: Any) -> BeforeValidator:
    """Plain text is short for what `make` makes of it; `accepted` is what the API document shows."""
    return BeforeValidator(
        lambda value: make(value) if isinstance(value, str) else value, json_schema_input_type=accepted
    )


class TextPartIn(History):
    """Text. Parts of an earlier answer may be sent back as they came."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str = Field(validation_alias=AliasChoices("text", "refusal"))


class ImageFields(BaseModel):
    """How images are shown to the model: for all of a request, or in the part of one."""

    image_max_tokens: int | None = Field(None, ge=1)
    image_region: Region | None = None
    image_tiles: Tiles | None = None


class OneImageFields(ImageFields):
    """The same for one image, with what OpenAI has for it."""

    detail: Detail | None = None


class ImageUrl(History, OneImageFields):
    """Where an image is: a `data:` address, or another kind that the server's settings allow."""

    url: str = Field(min_length=1)


class ImagePartIn(History, OneImageFields):
    """An image, as chat completions (`image_url`) or the Responses API (`input_image`) write it."""

    type: Literal["image_url", "input_image"]
    image_url: Annotated[ImageUrl, or_text(lambda url: {"url": url}, ImageUrl | str)]
    pages: PageList | None = None

    @property
    def address(self) -> str:
        """Where it is."""
        return self.image_url.url


class VideoUrl(History):
    """Where a video is, as an image's address is written; `data` may be base64 alone, as llama-server takes it."""

    url: str = Field(min_length=1, validation_alias=AliasChoices("url", "data"))


VideoAddress = Annotated[VideoUrl, or_text(lambda url: {"url": url}, VideoUrl | str)]


class VideoPartIn(History, ImageFields):
    """A video as vLLM (`video_url`), llama-server (`input_video`) or Qwen (`video`) write it, or a list of its frames.

    `fps` and `max_frames` say which frames of a file are read.
    """

    type: Literal["video_url", "input_video", "video"]
    video_url: VideoAddress | None = None
    input_video: VideoAddress | None = None
    video: Annotated[list[VideoAddress], Field(min_length=1)] | VideoAddress | None = None
    fps: float | None = Field(None, gt=0, le=1000)
    max_frames: int | None = Field(None, ge=1, le=256, validation_alias=AliasChoices("max_frames", "nframes"))

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        if isinstance(value, dict) and (cut := sorted({"video_start", "video_end"} & value.keys())):
            raise ValueError(f"{cut[0]} is not supported: cut the video first")
        return value

    @model_validator(mode="after")
    def _is_somewhere(self) -> Self:
        if not (self.video_url or self.input_video or self.video):
            raise ValueError("no video in it: give video_url with the url of one, or video with a list of its frames")
        return self

    @property
    def addresses(self) -> list[str]:
        """Where the video is, as images are addressed, or where each of its frames is."""
        found = self.video_url or self.input_video or self.video
        if not isinstance(found, VideoUrl):
            return [one.url for one in found or ()]
        if found.url.startswith(_JPEGS):  # what vLLM's client joins with commas
            return [f"data:image/jpeg;base64,{one}" for one in found.url.removeprefix(_JPEGS).split(",")]
        return [found.url if ":" in found.url[:20] else f"data:;base64,{found.url}"]

    @property
    def address(self) -> str:
        """All of them."""
        return "".join(self.addresses)

    @property
    def is_listed(self) -> bool:
        """Whether the addresses are those of frames."""
        found = self.video_url or self.input_video or self.video
        return not isinstance(found, VideoUrl) or found.url.startswith(_JPEGS)


class FilePartIn(History, ImageFields):
    """A PDF or an image as a file: base64 or a `data:` address in `file_data`, or where it is in `file_url`.

    Chat completions have these in `file`. `pages` chooses pages of a PDF or a TIFF, as "1-3,7".
    """

    type: Literal["file", "input_file"]
    file_data: str | None = Field(None, min_length=1)
    file_url: str | None = Field(None, min_length=1)
    filename: str = ""
    pages: PageList | None = None

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        inner = value.get("file") if isinstance(value, dict) else None
        return {**value, **inner} if isinstance(inner, dict) else value

    @model_validator(mode="after")
    def _has_one(self) -> Self:
        if (self.file_data is None) == (self.file_url is None):
            raise ValueError("give file_data, in base64, or file_url; file_id is not read: uploads serve batches alone")
        return self

    @property
    def address(self) -> str:
        """Where it is, as images are addressed."""
        data = self.file_data or ""
        return self.file_url or (data if data.lstrip()[:5].lower() == "data:" else f"data:;base64,{data}")


PartIn = Annotated[TextPartIn | ImagePartIn | VideoPartIn | FilePartIn, Field(discriminator="type")]
Parts = Annotated[list[PartIn], Field(max_length=MAX_PARTS)]
ContentIn = Annotated[Parts, or_text(lambda text: [{"type": "text", "text": text}], str | Parts)]
