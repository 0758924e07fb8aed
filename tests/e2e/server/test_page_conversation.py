"""The web page in a headless Chromium: a conversation over reloads, limits, long answers and a server that goes."""

import io
import os
from collections.abc import Iterator
from typing import Any

import PIL.Image
import pytest
from conftest import Server, start_server
from page_driver import CHAT, IMAGE, LAST, MARKS, SHAPES, SIGN, Visit, expect, says

pytestmark = MARKS

PREFIX = "/tools/opsin"
FLAGS = ("--root-path", PREFIX, "--max-images", "2")
PULL = "opsin pull qwen3-vl-4b"
# How far the end of the answer is below the place where the footer begins.
BELOW = """() => document.querySelector(".answer").getBoundingClientRect().bottom
  - document.querySelector("footer").getBoundingClientRect().top"""


@pytest.fixture(name="own", scope="module")
def start_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """A server below a path that takes two images; a test may stop it and append another."""
    servers = [start_server(tmp_path_factory.mktemp("own"), *FLAGS)]
    yield servers
    servers[-1].stop()


@pytest.fixture(name="below")
def open_below(browser: Any, own: list[Server]) -> Iterator[Visit]:
    """The page of that server; what it asks for outside the path is found when it is closed."""
    visit = Visit(browser, own[-1].base_url + PREFIX, viewport={"width": 1280, "height": 860})
    visit.open()
    yield visit
    visit.close()


def asks(visit: Visit, text: str) -> list[dict[str, Any]]:
    """Ask, and the messages that went with it."""
    with visit.page.expect_request(CHAT) as sent:
        visit.ask(text)
    messages: list[dict[str, Any]] = sent.value.post_data_json["messages"]
    return messages


def images_in(messages: list[dict[str, Any]]) -> int:
    return sum(
        part["type"] == "image_url" for message in messages if message["role"] == "user" for part in message["content"]
    )


def noise(width: int) -> dict[str, Any]:
    """An image that no format makes smaller: three bytes a pixel."""
    file = io.BytesIO()
    PIL.Image.frombytes("RGB", (width, width), os.urandom(3 * width * width)).save(file, "PNG", compress_level=0)
    return {"name": f"noise-{width}.png", "mimeType": "image/png", "buffer": file.getvalue()}


def test_the_demo_model_is_named_once_and_how_to_get_another(visit: Visit) -> None:
    # Also where the question comes before the page knows the model.
    held: list[Any] = []
    visit.page.route("**/props", lambda route: held.append(route))  # noqa: PLW0108 - a method of a list takes no mark
    with visit.page.expect_request("**/props"):
        visit.page.reload()
    visit.ask("What do you see?")
    visit.until("!document.querySelector('#stop').hidden")
    held[0].continue_()
    visit.page.unroute("**/props")
    expect(visit.answered().locator(".notes")).to_contain_text(PULL)
    visit.ask("Where is the star?")
    visit.answered(1)
    visit.page.reload()
    visit.ask("How big is the star?")
    visit.answered(2)
    expect(visit.page.get_by_text(PULL)).to_have_count(1)
    expect(visit.page.locator(".turn").first).to_contain_text(PULL)


def test_another_model_is_not_called_the_demo(visit: Visit) -> None:
    def real(route: Any) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, json={**reply.json(), "is_demo": False})

    visit.page.route("**/props", real)
    with visit.page.expect_response("**/props"):
        visit.page.reload()
    visit.ask("What do you see?")
    visit.answered()
    expect(visit.page.get_by_text(PULL)).to_have_count(0)


def test_a_reload_keeps_the_conversation_and_a_new_one_clears_it(visit: Visit) -> None:
    page = visit.page
    visit.hand_over(SIGN)
    first = asks(visit, "What is written?")
    before = visit.answered().inner_text()
    page.reload()
    assert visit.answered().inner_text() == before
    kept = page.locator(".images img")
    expect(kept).to_have_count(1)
    assert kept.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    again = asks(visit, "What do you see?")
    assert [message["role"] for message in again] == ["user", "assistant", "user"]
    assert again[0] == first[0]
    visit.answered(1)
    expect(kept).to_have_count(1)

    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_label("Your question")).to_be_focused()
    page.reload()
    expect(page.get_by_role("heading", name="Ask about your images")).to_be_visible()
    expect(page.locator(".turn")).to_have_count(0)
    assert len(asks(visit, "What do you see?")) == 1
    visit.answered()


def test_a_reload_keeps_what_came_of_an_answer_and_a_question_without_one(visit: Visit) -> None:
    page = visit.page
    visit.answer_by_hand()
    visit.hand_over(SIGN)
    visit.ask("What is this?")
    visit.say("Half an")
    expect(page.locator(".answer")).to_have_text("Half an")
    page.reload()
    turn = visit.answered()
    expect(turn.locator(".answer")).to_have_text("Half an")
    expect(turn.locator(".notes")).to_contain_text("Stopped.")
    visit.hand_over(SHAPES)
    visit.ask("And this?")
    visit.until("'say' in window")
    page.reload()
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.get_by_label("Your question")).to_have_value("And this?")
    expect(page.locator("#tray img")).to_have_count(1)


def test_images_too_large_for_the_tab_are_missed_after_a_reload_and_the_rest_is_there(visit: Visit) -> None:
    page = visit.page
    visit.answer_with(says("Noise.", "stop"), {**LAST, "images": [IMAGE]})
    page.locator("#files").set_input_files([noise(1120)])
    visit.ask("What is this?")
    visit.answered()
    page.locator("#files").set_input_files([noise(100)])
    assert images_in(asks(visit, "And this?")) == 2
    visit.answered(1)
    page.reload()
    expect(visit.answered(0).locator(".notes")).to_contain_text("Not kept over the reload: 1 image.")
    expect(visit.answered(1).locator(".notes")).not_to_contain_text("Not kept")
    expect(page.locator(".images img")).to_have_count(1)
    messages = asks(visit, "Are they alike?")
    assert (len(messages), images_in(messages)) == (5, 1)
    visit.answered(2)
    page.reload()
    expect(visit.answered(0).locator(".notes")).to_contain_text("Not kept over the reload: 1 image.")


def test_enter_sends_and_shift_enter_breaks_the_line(visit: Visit) -> None:
    page = visit.page
    visit.answer_with(says("Yes.", "stop"), LAST)
    page.get_by_label("Your question").focus()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.get_by_label("Your question")).to_have_value("One\ntwo")
    page.keyboard.press("Enter")
    assert visit.answered().locator(".question").inner_text() == "One\ntwo"
    expect(page.get_by_label("Your question")).to_have_value("")


def test_enter_belongs_to_an_input_method_that_composes(visit: Visit) -> None:
    page = visit.page
    visit.answer_with(says("はい。", "stop"), LAST)
    page.get_by_label("Your question").focus()
    keys = visit.context.new_cdp_session(page)
    keys.send("Input.imeSetComposition", {"text": "にほん", "selectionStart": 3, "selectionEnd": 3})
    expect(page.get_by_label("Your question")).to_have_value("にほん")
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_role("alert")).to_be_hidden()
    keys.send("Input.insertText", {"text": "日本"})
    page.keyboard.press("Enter")
    assert visit.answered().locator(".question").inner_text() == "日本"


@pytest.mark.parametrize("how", ["button", "key"])
def test_the_question_has_the_focus_after_a_stop(visit: Visit, how: str) -> None:
    page = visit.page
    visit.answer_by_hand()
    visit.ask("What do you see?")
    visit.say("A ring")
    expect(page.locator(".answer")).to_have_text("A ring")
    if how == "key":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    expect(visit.answered().locator(".notes")).to_contain_text("Stopped.")
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type("And now?")
    expect(page.get_by_label("Your question")).to_have_value("And now?")


def test_a_long_answer_is_followed_unless_the_reader_scrolls_up(visit: Visit) -> None:
    page = visit.page
    visit.answer_by_hand()
    visit.ask("Count.")

    def count_to(end: int) -> float:
        """Let the answer grow; how far its end is out of sight then."""
        visit.say("".join(f"line {number}\n" for number in range(end - 40, end + 1)))
        expect(page.locator(".answer")).to_contain_text(f"line {end}\n", use_inner_text=True)
        return float(page.evaluate(BELOW))

    assert count_to(40) < 0
    assert count_to(80) < 0
    bottom = page.evaluate("scrollY")
    assert bottom > 500
    page.mouse.move(640, 300)
    page.mouse.wheel(0, -300)
    visit.until(f"scrollY <= {bottom} - 300")
    assert count_to(120) > 300
    assert page.evaluate("scrollY") == bottom - 300
    page.mouse.wheel(0, 100_000)
    visit.until(f"({BELOW})() < 0")
    assert count_to(160) < 0
    page.evaluate("done()")
    expect(visit.answered().locator(".notes")).to_be_in_viewport()


def test_the_page_works_below_a_path(below: Visit) -> None:
    page = below.page
    expect(page.locator("#model")).to_have_text("opsin-demo")
    expect(page.locator("#strip")).to_be_visible()
    page.get_by_role("button", name="Try this one").click()
    expect(page.locator("#tray img")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(below.answered().locator(".waterfall")).to_be_visible()
    page.reload()
    expect(below.answered().locator(".waterfall")).to_be_visible()


def test_more_images_than_the_server_takes_drop_the_oldest_with_a_note(below: Visit) -> None:
    for number, path in enumerate((SHAPES, SIGN, SHAPES, SIGN)):
        below.hand_over(path)
        assert images_in(asks(below, "What do you see?")) == min(number + 1, 2)
        notes = below.answered(number).locator(".notes")
        expect(below.page.locator(".problem:visible")).to_have_count(0)
        if number < 2:
            expect(notes).not_to_contain_text("not sent")
        else:
            expect(notes).to_contain_text(f"{number - 1} older image{'s' * (number > 2)} not sent")
    assert images_in(asks(below, "And where?")) == 2
    expect(below.answered(4).locator(".problem")).to_have_count(0)

    # More in one question than the server takes is said by the server, and can be put right.
    below.page.locator("#files").set_input_files([SHAPES, SIGN, SHAPES.with_name("number.png")])
    below.ask("How many?")
    expect(below.answered(5).locator(".problem")).to_contain_text("2 are the limit")
    below.page.get_by_role("button", name="Remove number.png").click()
    below.page.get_by_role("button", name="Ask", exact=True).click()
    expect(below.answered(6).locator(".waterfall")).to_be_visible()


def test_larger_images_than_the_server_takes_together_drop_the_oldest(visit: Visit) -> None:
    def narrow(route: Any) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, json={**reply.json(), "max_body_bytes": 200_000})

    visit.page.route("**/props", narrow)
    with visit.page.expect_response("**/props"):
        visit.page.reload()
    visit.answer_with(says("Noise.", "stop"), {**LAST, "images": [IMAGE]})
    visit.page.locator("#files").set_input_files([noise(150), noise(150)])
    first = asks(visit, "What is this?")[0]["content"]
    visit.answered()
    visit.page.locator("#files").set_input_files([noise(150)])
    messages = asks(visit, "And this?")
    assert (messages[0]["content"], images_in(messages)) == (first[1:], 2)
    expect(visit.answered(1).locator(".notes")).to_contain_text("1 older image not sent")


def test_a_server_that_goes_and_comes_back_is_noticed_without_a_reload(
    own: list[Server], below: Visit, tmp_path_factory: pytest.TempPathFactory
) -> None:
    page, line = below.page, below.page.locator("#connection")
    below.ask("What do you see?")
    answer = below.answered().locator(".answer").inner_text()
    expect(line).to_be_hidden()
    assert own[-1].stop() == 0
    expect(line).to_have_text("The server does not answer. This page keeps trying to reach it.")
    expect(page.locator("#strip")).to_be_hidden()
    below.ask("Where is the star?")
    expect(below.answered(1).locator(".problem")).to_contain_text("The connection to the server was lost")
    expect(line).to_be_visible()

    port = own[-1].base_url.rpartition(":")[2]
    own.append(start_server(tmp_path_factory.mktemp("again"), *FLAGS, "--port", port))
    expect(line).to_have_text("The server is back.")
    expect(page.locator("#strip")).to_be_visible()
    expect(page.get_by_label("Your question")).to_have_value("Where is the star?")
    page.get_by_label("Your question").press("Enter")
    assert below.answered(2).locator(".answer").inner_text()
    assert below.answered(0).locator(".answer").inner_text() == answer
    expect(line).to_be_hidden()


def test_a_server_whose_metrics_need_a_key_is_missed_too(visit: Visit) -> None:
    page = visit.page
    page.route("**/metrics", lambda route: route.fulfill(status=401, body="{}"))
    page.reload()
    with page.expect_response("**/health"):
        pass
    page.route("**/health", lambda route: route.abort())
    expect(page.locator("#connection")).to_contain_text("does not answer")
    page.unroute("**/health")
    expect(page.locator("#connection")).to_have_text("The server is back.")
