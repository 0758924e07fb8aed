"""A visit to the web page in a headless Chromium, for its tests.

Where a test needs an answer that the demo model does not give (markup, a guard's verdict, a refusal), the browser's
request is answered by the test in the server's place.
"""

import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
playwright_api = pytest.importorskip("playwright.sync_api", reason="the page is tested through Playwright")
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="the page is tested in Debian's chromium: install it"),
]
expect = playwright_api.expect

SHAPES = Path(str(files("opsin.models"))) / "demo" / "shapes.png"
SIGN = Path(str(files("opsin.models"))) / "demo" / "sign.png"
VIOLATIONS = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""
HAND_OVER = """([bytes, name, type, kind]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], name, { type }));
  const options = { bubbles: true, cancelable: true };
  if (kind === "paste") {
    document.activeElement.dispatchEvent(new ClipboardEvent("paste", { ...options, clipboardData: transfer }));
  } else {
    for (const step of ["dragenter", "dragover", "drop"]) {
      document.querySelector("main").dispatchEvent(new DragEvent(step, { ...options, dataTransfer: transfer }));
    }
  }
}"""
STAGES = {
    "queue_ms": 40.0,
    "load_ms": 0.0,
    "fetch_ms": 0.0,
    "image_decode_ms": 10.0,
    "preprocess_ms": 10.0,
    "encode_ms": 50.0,
    "image_prefill_ms": 30.0,
    "text_prefill_ms": 10.0,
    "sample_ms": 5.0,
    "decode_ms": 40.0,
    "detokenize_ms": 1.0,
    "other_ms": 4.0,
    "total_ms": 200.0,
}
IMAGE = {
    "sha256": "0" * 64,
    "width": 640,
    "height": 480,
    "resized_width": 336,
    "resized_height": 336,
    "tokens": 576,
    "tiles": 1,
    "cached": False,
}
LAST: dict[str, Any] = {
    "choices": [],
    "usage": {"prompt_tokens": 600, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 0}},
    "timings": {"predicted_n": 5, "predicted_ms": 46.0, "predicted_per_second": 108.7},
    "stages": STAGES,
    "images": [IMAGE],
    "guard": None,
}

# An answer that comes as the test says it: some `say`, then `done`.
BY_HAND = """
const fetchReally = window.fetch;
window.fetch = (address, options) => {
  if (!String(address).endsWith("/v1/chat/completions")) return fetchReally(address, options);
  const bytes = new TextEncoder();
  const body = new ReadableStream({ start(controller) {
    const send = (data) => controller.enqueue(bytes.encode(`data: ${data}\\n\\n`));
    window.say = (content) => send(JSON.stringify({ choices: [{ delta: { content } }] }));
    window.done = () => { send("[DONE]"); controller.close(); };
    options.signal.addEventListener("abort", () => controller.error(options.signal.reason));
  } });
  return Promise.resolve(new Response(body, { headers: { "Content-Type": "text/event-stream" } }));
};
"""
CHAT = "**/v1/chat/completions"


class Visit:
    """A page that is open, and everything suspicious that happened in it."""

    def __init__(self, browser: Any, base_url: str, **options: Any) -> None:
        self.base_url = base_url
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(20_000)
        self.page = self.context.new_page()
        self.page.add_init_script(VIOLATIONS)
        self.complaints: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._asked)

    def _heard(self, message: Any) -> None:
        # A status that a test asked for is written to the console by the browser itself.
        if message.type in {"error", "warning"} and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((f"{self.base_url}/", "blob:", "data:")):
            self.outside.append(request.url)

    def open(self) -> Any:
        self.page.goto(f"{self.base_url}/")
        return self.page

    def hand_over(self, path: Path, kind: str = "drop", mime: str = "image/png") -> None:
        self.page.evaluate(HAND_OVER, [list(path.read_bytes()), path.name, mime, kind])

    def ask(self, text: str) -> None:
        self.page.get_by_label("Your question").fill(text)
        self.page.get_by_role("button", name="Ask", exact=True).click()

    def until(self, expression: str) -> None:
        """Wait for something that no locator finds; the page's policy forbids the browser to evaluate it by itself."""
        end = time.monotonic() + 20
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(20)

    def answer_by_hand(self) -> None:
        """Load the page anew; from now on its answers come from `say`, and end with the page's own `done`."""
        self.page.add_init_script(BY_HAND)
        self.page.reload()

    def say(self, text: str) -> None:
        self.until("'say' in window")
        self.page.evaluate("text => say(text)", text)

    def answered(self, number: int = 0) -> Any:
        """The turn, once its answer is whole."""
        turn = self.page.locator(".turn").nth(number)
        expect(turn.locator(".answer")).to_have_attribute("aria-busy", "false", timeout=60_000)
        return turn

    def answer_with(self, *events: dict[str, Any], status: int = 200, only_without: str | None = None) -> None:
        """Answer questions in the server's place; `only_without` lets requests pass that carry this key."""
        body = json.dumps(events[0]) if status != 200 else stream(*events)
        kind = "application/json" if status != 200 else "text/event-stream"

        def reply(route: Any) -> None:
            if only_without is not None and route.request.headers.get("authorization") == f"Bearer {only_without}":
                route.fallback()
            else:
                route.fulfill(status=status, content_type=kind, body=body)

        self.page.route(CHAT, reply)

    def close(self) -> None:
        """Leave, and see that nothing suspicious happened."""
        violations = self.page.evaluate("window.violations")
        self.context.close()
        assert (violations, self.complaints, self.outside) == ([], [], [])


def stream(*events: dict[str, Any]) -> str:
    return ": wait\n\n" + "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def says(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
