"""`opsin chat IMAGE…`: a conversation about images in the terminal."""

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import typer

from opsin.api import Opsin
from opsin.cli import options as o
from opsin.cli.ask import follow, opened, show_limits
from opsin.cli.console import say, working
from opsin.core.answer import Answer
from opsin.core.config import checked
from opsin.core.errors import BadInput, BadParameter, ContextOverflow
from opsin.core.files import expand, write_whole
from opsin.core.image_options import ImageOptions
from opsin.core.request import Image, SamplingParams
from opsin.core.settings import EngineSettings, ImageSettings
from opsin.prompt import Message

HELP = (
    "Type a question; a path in it, or /image FILE, shows an image. /new starts again, /save FILE keeps what was said, "
    "/bye or Ctrl-D ends; Ctrl-C stops an answer, and Alt-Enter begins a new line."
)
# In quotes, or with each space behind a backslash, as shells and file managers write paths.
_WORD = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|(?:\\.|[^\s\\])+""")


@o.flags_of(SamplingParams, "system", *o.ANSWER)
@o.flags_of(EngineSettings, *o.ENGINE, "image_max_tokens", "image_min_tokens", "disk_cache")
@o.flags_of(ImageOptions, *o.IMAGES)
@o.flags_of(ImageSettings, *o.PAGES)
def chat(
    images: Annotated[list[str] | None, typer.Argument(metavar="IMAGE…", help="images, PDFs or addresses")] = None,
    **flags: Any,
) -> None:
    """Talk about images; every question knows what was said before.

    Settings of model, hardware and images can also be given in opsin.toml or as OPSIN_* environment variables.
    """
    params, pages = o.given(SamplingParams, flags), o.given(ImageSettings, flags)
    checked(ImageSettings, pages)  # before a model is loaded
    shown = checked(ImageOptions, {name: flags[name] for name in o.IMAGES}).model_dump() | pages
    with opened(o.settings_of(flags)) as opsin:
        begin = [Message("system", flags["system"])] if flags["system"] else []
        talk = _Talk(opsin, params, begin, shown, images or [])
        say(HELP)
        read = _reader()
        while (line := read()) is not None:
            try:
                talk.take(line)
            except ContextOverflow as error:
                say(f"opsin: {error} /new starts a new conversation.")
            except BadInput as error:
                say(f"opsin: {error}")


class _Talk:
    """What was said, and the images that go with the next question."""

    def __init__(
        self, opsin: Opsin, params: dict[str, Any], begin: list[Message], shown: dict[str, Any], first: list[str]
    ) -> None:
        self._opsin, self._params, self._shown = opsin, params, shown
        self._begin, self._first = begin, self._read(first)
        self._said, self._new = begin, self._first

    def take(self, line: str) -> None:
        """Do what a line says. Raises BadInput."""
        command, _, rest = line.partition(" ")
        sources, question = find_images(line)
        if command == "/image" and rest.strip():
            sources, more = find_images(rest)
            names = [*sources, more] if more else sources
            self._new = [*self._new, *self._read(names)]
            say("(the image goes with your next question)")
        elif command == "/new":
            self._said, self._new = self._begin, self._first
            say("(a new conversation about the same images)")
        elif command == "/save" and rest.strip():
            self._save(expand(unquoted(rest.strip())))
        elif command.startswith("/") and not sources:
            say(HELP)
        elif line:
            self._new = [*self._new, *self._read(sources)]
            if question:
                self._ask(question)
            else:
                say("(the image goes with your next question)")

    def _read(self, sources: list[str]) -> list[Image]:
        found = [image for source in sources for image in self._opsin.images(source, **self._shown)]
        for note in dict.fromkeys(note for image in found for note in image.notes):
            say(f"({note})")
        return found

    def _ask(self, question: str) -> None:
        asked = [*self._said, Message("user", [*self._new, question])]
        if (answer := _answer(self._opsin, asked, self._params)) is not None:
            self._said, self._new = [*asked, Message("assistant", answer.text)], []

    def _save(self, path: Path) -> None:
        """Write what was said as Markdown, over what was there."""
        blocks = []
        for message in self._said:
            shown = [
                f"(image of {part.width} x {part.height})" if isinstance(part, Image) else part
                for part in message.parts
            ]
            blocks.append(f"**{message.role}:** " + " ".join(shown) + "\n")
        try:
            write_whole(path, "\n".join(blocks))
        except OSError as error:
            raise BadInput(f"{path} cannot be written: {error.strerror or error}.") from None
        say(f"(saved in {path})")


def find_images(line: str) -> tuple[list[str], str]:
    """Paths of image files in a line, however they are quoted, and its text, in which they are "this image"."""
    found, last = list[str](), ""

    def taken(word: re.Match[str]) -> str:
        nonlocal last
        whole = unquoted(word[0])
        for text in (whole, whole.rstrip("?!.,;:")):  # a question may end with the path
            is_address = text.startswith("file://")
            with contextlib.suppress(OSError, ValueError, BadParameter):  # a name that no file can have
                path = Path(url2pathname(urlsplit(text).path)) if is_address else expand(text)
                if (is_address or path.suffix or any(sign in text for sign in "/\\")) and path.is_file():
                    found.append(str(path))
                    return f"this image{whole[len(text) :]}" if last and last not in "?!.:;" else ""
        last = word[0][-1]
        return word[0]

    rest = _WORD.sub(taken, line)
    return found, " ".join(rest.split()) if found else line.strip()


def unquoted(word: str) -> str:
    """A word without its quotes or backslashes."""
    if word[:1] == "'" == word[-1:] and len(word) > 1:
        return word[1:-1]
    inner = word[1:-1] if word[:1] == '"' == word[-1:] and len(word) > 1 else word
    # On Windows a backslash separates folders.
    return inner if sys.platform == "win32" else re.sub(r"\\(.)", r"\1", inner)


def _answer(opsin: Opsin, messages: list[Message], params: dict[str, Any]) -> Answer | None:
    """The answer, shown as it comes; None if it was stopped with Ctrl-C."""
    stream = None
    try:
        with working("thinking") as line:
            stream = opsin.submit(messages, **params)
            answer = follow(stream, line)
    except KeyboardInterrupt:
        if stream is not None:
            stream.cancel()
        say("(stopped)")
        return None
    show_limits(answer)
    return answer


def _reader() -> Callable[[], str | None]:
    """What reads the next line; on a terminal it can be edited, and earlier ones come back. None at the end."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda: _ended(sys.stdin.readline())
    from platformdirs import user_data_path
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    history: Any = InMemoryHistory()
    with contextlib.suppress(OSError):  # a home that cannot be written to has no history
        folder = user_data_path("opsin", ensure_exists=True)
        history = FileHistory(folder / "chat-history")
    session: PromptSession[str] = PromptSession("> ", history=history, key_bindings=keys)

    def read() -> str | None:
        while True:
            with contextlib.suppress(KeyboardInterrupt):  # an empty line, as in a shell
                try:
                    return _ended(session.prompt() + "\n")
                except EOFError:
                    return None

    return read


def _ended(line: str) -> str | None:
    return None if not line or line.strip() in {"/bye", "/exit", "/quit"} else line.strip()
