"""The web page in a headless Chromium, as axe-core judges it, from narrow to wide, light and dark."""

from importlib.resources import files
from typing import Any

import pytest
from page_driver import IMAGE, LAST, MARKS, SHAPES, SIGN, Visit, expect, says

pytest.importorskip("axe_playwright_python", reason="the page is judged by axe-core")
pytestmark = MARKS

AXE = (files("axe_playwright_python") / "axe.min.js").read_text()
# What is wrong, and what axe cannot tell.
JUDGE = """async () => {
  const { violations, incomplete } = await axe.run();
  return [...violations, ...incomplete].map((found) => [found.id, ...found.nodes.map((node) => node.html)]);
}"""
LONG = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"


def check(page: Any, width: int) -> None:
    """Nothing is found in both colour schemes, and nothing is wider than the window."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(JUDGE) == []
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_axe_finds_nothing_and_nothing_scrolls_sideways(browser: Any, server: Any, width: int) -> None:
    visit = Visit(browser, server.base_url, viewport={"width": width, "height": 800}, reduced_motion="reduce")
    visit.context.add_init_script(AXE)
    page = visit.open()
    expect(page.locator("#strip")).to_be_visible()
    check(page, width)

    page.locator("#files").set_input_files([SHAPES, SIGN, SHAPES, SIGN, SHAPES, SIGN])
    expect(page.locator("#tray img")).to_have_count(6)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("The question is empty")
    check(page, width)

    guard = {"reason": "cycle", "at_token": 120}
    thought = {"choices": [{"index": 0, "delta": {"reasoning_content": LONG}}]}
    last = {**LAST, "guard": guard, "images": [IMAGE, {**IMAGE, "orientation": 6, "cached": True}] * 3}
    visit.answer_with(thought, says(LONG, "length"), last)
    visit.ask(LONG)
    visit.answered().get_by_text("Reasoning").click()
    visit.ask("Again?")
    visit.answered(1)
    check(page, width)
    page.route("**/metrics", lambda route: route.abort())
    expect(page.locator("#connection")).to_be_visible()
    visit.answer_with({"error": {"message": f"{LONG} is not known."}}, status=400)
    visit.ask("What?")
    visit.answered(2)
    check(page, width)

    visit.answer_with({"error": {"message": "An API key is needed."}}, status=401)
    visit.ask("What?")
    expect(page.get_by_label("This server asks for an API key")).to_be_visible()
    check(page, width)
    visit.close()
