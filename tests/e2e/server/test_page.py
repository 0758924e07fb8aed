"""The web page in a headless Chromium: what people do with it, and what it shows them.

`PAGE_SCREENSHOTS=docs` keeps the images of the page there.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from page_driver import CHAT, IMAGE, LAST, MARKS, SHAPES, SIGN, Visit, expect, playwright_api, says

pytestmark = MARKS


@pytest.fixture(name="shapes")
def new_shapes(tmp_path: Path) -> Path:
    """The demo's image with one pixel of its own: no cache of the server knows it."""
    with PIL.Image.open(SHAPES) as image:
        image.putpixel((0, 0), tuple(os.urandom(3)))
        image.save(tmp_path / "shapes.png")
    return tmp_path / "shapes.png"


def numbers(turn: Any) -> dict[str, float]:
    """Milliseconds by stage, as the table tells them."""
    rows = turn.locator(".waterfall tbody tr, .waterfall tfoot tr")
    found = {}
    for row in rows.all():
        label = row.locator("th").evaluate("th => th.firstChild.textContent")
        found[label] = float(row.locator("td").nth(1).inner_text().replace(",", ""))
    return found


def test_a_dropped_image_is_asked_about_and_its_milliseconds_are_shown(visit: Visit, shapes: Path) -> None:
    page = visit.page
    page.evaluate(
        """() => { window.lengths = new Set();
        new MutationObserver(() => window.lengths.add(document.querySelector(".answer")?.textContent.length))
          .observe(document.body, { subtree: true, childList: true, characterData: true }); }"""
    )
    visit.hand_over(shapes)
    expect(page.get_by_role("list", name="Images to send").get_by_role("img", name="shapes.png")).to_be_visible()
    visit.ask("What do you see?")
    turn = visit.answered()
    answer = turn.locator(".answer").inner_text()
    assert re.search("ring|square|circle|star", answer), answer
    assert page.evaluate("window.lengths.size") > 3, "the answer came in one piece"
    assert page.locator(".images img").bounding_box()["width"] > 250

    shown = numbers(turn)
    assert {"vision encode", "image prefill", "text prefill", "decode"} <= set(shown)
    assert shown["vision encode"] > 0
    # Each row is rounded to a tenth, and a stage below that has no row.
    parts = sum(ms for label, ms in shown.items() if label != "total")
    assert parts == pytest.approx(shown["total"], abs=0.1 * 12)

    boxes = [bar.bounding_box() for bar in turn.locator(".bar").all()]
    labels = [label for label, ms in shown.items() if label != "total" and ms > 0]
    assert len(boxes) == len(labels)
    starts = [box["x"] for box in boxes]
    assert starts == sorted(starts)
    longest = max(labels, key=lambda label: shown[label])
    assert labels[max(range(len(boxes)), key=lambda at: boxes[at]["width"])] == longest

    details = turn.locator(".details").inner_text()
    assert "448 × 448" in details
    assert re.search(r"resized to \d+ × \d+, 1 tile, \d+ tokens", details)
    assert re.search(r"Prompt\s+\d+ tokens", details)


def test_a_follow_up_question_goes_with_the_conversation_and_what_is_remembered_is_told(visit: Visit) -> None:
    bodies: list[dict[str, Any]] = []
    visit.page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
    visit.hand_over(SIGN)
    visit.ask("What do you see?")
    first = visit.answered().locator(".answer").inner_text()
    visit.ask("What is written?")
    turn = visit.answered(1)

    assert [message["role"] for message in bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert bodies[1]["messages"][0] == bodies[0]["messages"][0]
    assert bodies[1]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert bodies[1]["messages"][1]["content"] == first
    expect(turn.locator(".waterfall")).to_contain_text("from the cache, not run")
    expect(turn.locator(".details")).to_contain_text("from the image cache")
    expect(turn.locator(".details")).to_contain_text(re.compile(r"[1-9]\d* of them from the prefix cache"))
    # The image stays beside both questions.
    assert visit.page.locator(".images img").count() == 1
    assert visit.page.locator(".group").count() == 1


def test_several_images_are_picked_and_one_is_taken_away(visit: Visit) -> None:
    page = visit.page
    visit.answer_with(says("Two.", "stop"), {**LAST, "images": [IMAGE, {**IMAGE, "orientation": 6, "cached": True}]})
    page.locator("#files").set_input_files([SHAPES, SIGN, SHAPES.with_name("number.png")])
    tray = page.get_by_role("list", name="Images to send")
    expect(tray.get_by_role("img")).to_have_count(3)
    tray.get_by_role("button", name="Remove number.png").click()
    expect(tray.get_by_role("img")).to_have_count(2)
    with page.expect_request(CHAT) as sent:
        visit.ask("How many images are there?")
    kinds = [part["type"] for part in sent.value.post_data_json["messages"][0]["content"]]
    assert kinds == ["image_url", "image_url", "text"]
    details = visit.answered().locator(".details")
    expect(details).to_contain_text("Image 1")
    expect(details).to_contain_text("encoded for this answer")
    expect(details).to_contain_text("640 × 480, rotated by 90° clockwise, resized to 336 × 336")
    expect(tray).to_be_hidden()


def test_an_image_can_be_pasted(visit: Visit) -> None:
    visit.page.get_by_label("Your question").focus()
    visit.hand_over(SIGN, "paste")
    expect(visit.page.get_by_role("img", name="sign.png")).to_be_visible()
    visit.ask("What is written?")
    assert visit.answered().locator(".answer").inner_text()


def test_what_is_no_image_is_refused_by_name(visit: Visit, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("plain")
    visit.hand_over(notes, mime="text/plain")
    expect(visit.page.get_by_role("alert")).to_contain_text("Not an image: notes.txt.")
    expect(visit.page.get_by_role("list", name="Images to send")).to_be_hidden()


def test_everything_can_be_done_with_the_keyboard(visit: Visit) -> None:
    page = visit.page
    focused = "document.activeElement.id || document.activeElement.getAttribute('aria-label')"

    def tab_to(name: str, key: str = "Tab") -> None:
        for _ in range(12):
            page.keyboard.press(key)
            if page.evaluate(focused) == name:
                return
        pytest.fail(f"{name} is not reached with {key}")

    page.on("filechooser", lambda _: None)  # from now on choosers are caught, also one that opens at once
    tab_to("pick")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([SHAPES, SIGN])
    expect(page.get_by_role("img", name="sign.png")).to_be_visible()
    assert page.evaluate(focused) == "question"
    tab_to("Remove sign.png", "Shift+Tab")
    page.keyboard.press("Enter")
    assert page.evaluate(focused) == "Remove shapes.png"
    tab_to("question")
    page.keyboard.type("How many shapes are there?")
    page.keyboard.press("Enter")
    assert visit.answered().locator(".answer").inner_text()
    assert page.evaluate(focused) == "question", "the next question can be typed at once"
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The question is empty: ask something.")


def test_an_endless_answer_is_stopped_and_the_server_hears_of_it(visit: Visit) -> None:
    page = visit.page

    def endlessly(route: Any) -> None:
        body = route.request.post_data_json
        route.continue_(post_data=json.dumps({**body, "ignore_eos": True, "guard": False, "max_tokens": 4000}))

    page.route(CHAT, endlessly)
    visit.hand_over(SHAPES)
    visit.ask("What do you see?")
    answer = page.locator(".answer")
    expect(answer).to_have_text(re.compile(r".{100,}"))
    with page.expect_event("requestfailed"):
        page.keyboard.press("Escape")
    turn = visit.answered()
    expect(turn.locator(".notes")).to_contain_text("Stopped.")
    stopped_at = answer.inner_text()
    page.unroute(CHAT)
    expect(page.locator("#running")).to_have_text("0", timeout=10_000)
    visit.ask("Where is the star?")
    assert visit.answered(1).locator(".answer").inner_text()
    assert answer.first.inner_text() == stopped_at


def test_a_question_that_is_stopped_before_its_answer_comes_back(visit: Visit) -> None:
    visit.page.route(CHAT, lambda route: None)  # never answered
    visit.hand_over(SHAPES)
    visit.ask("What do you see?")
    expect(visit.page.get_by_text("Looking…")).to_be_visible()
    visit.page.get_by_role("button", name="Stop").click()
    expect(visit.page.get_by_text("Stopped.")).to_be_visible()
    expect(visit.page.get_by_label("Your question")).to_have_value("What do you see?")
    expect(visit.page.locator("#tray img")).to_have_count(1)


def test_markup_in_an_answer_is_shown_as_text(visit: Visit) -> None:
    hostile = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 1</script>**&amp;'
    visit.answer_with(says(hostile[:30]), says(hostile[30:], "stop"), LAST)
    visit.ask(hostile)
    turn = visit.answered()
    assert turn.locator(".answer").text_content() == hostile
    assert turn.locator(".question").text_content() == hostile
    assert turn.locator("img, script").count() == 0
    assert visit.page.evaluate("window.hacked") is None


def test_inline_scripts_and_outside_images_are_stopped_by_the_policy(visit: Visit) -> None:
    page = visit.page
    page.evaluate("document.body.append(Object.assign(new Image(), { src: 'https://127.0.0.1:9/x.png' }))")
    for setting in ("innerHTML = '<b>'", "setAttribute('onclick', 'window.hacked = 1')"):
        with pytest.raises(playwright_api.Error, match="requires 'Trusted"):
            page.evaluate(f"document.querySelector('h1').{setting}")
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('style'), { textContent: 'h1 { color: red }' }))"
    )
    assert set(page.evaluate("window.violations")) == {"img-src", "require-trusted-types-for", "style-src-elem"}
    page.evaluate("window.violations = []")
    visit.complaints.clear()
    visit.outside.clear()


@pytest.mark.parametrize(
    ("last", "finish", "sentence"),
    [
        (
            {"guard": {"reason": "cycle", "at_token": 120}},
            "length",
            "The guard ended this answer at token 120: it went",
        ),
        ({}, "length", "cut after 5 tokens: a larger “Longest answer” below lifts the limit"),
    ],
    ids=["guard", "limit"],
)
def test_an_answer_that_was_ended_says_why(visit: Visit, last: dict[str, Any], finish: str, sentence: str) -> None:
    visit.answer_with(says("over and over"), says("", finish), {**LAST, **last})
    visit.ask("What is this?")
    expect(visit.answered().locator(".notes")).to_contain_text(sentence)


def test_the_limit_on_the_answer_is_sent(visit: Visit) -> None:
    visit.page.get_by_label("Longest answer").fill("3")
    visit.hand_over(SHAPES)
    visit.ask("What do you see?")
    expect(visit.answered().locator(".notes")).to_contain_text("cut after 3 tokens")


def test_a_refusal_is_told_and_nothing_that_was_written_is_lost(visit: Visit) -> None:
    visit.answer_with({"error": {"message": "The image is too large: shrink it."}}, status=413)
    visit.hand_over(SHAPES)
    visit.ask("What is this?")
    expect(visit.answered().locator(".problem")).to_have_text("The image is too large: shrink it.")
    expect(visit.page.get_by_label("Your question")).to_have_value("What is this?")
    expect(visit.page.locator("#tray img")).to_have_count(1)


def test_an_error_in_the_middle_of_a_stream_is_told(visit: Visit) -> None:
    visit.answer_with(says("half an"), {"error": {"message": "The engine died: it is started again."}})
    visit.ask("What is this?")
    turn = visit.answered()
    expect(turn.locator(".answer")).to_have_text("half an")
    expect(turn.locator(".problem")).to_have_text("The engine died: it is started again.")


def test_a_key_is_asked_for_when_the_server_wants_one_and_kept_in_the_tab_only(visit: Visit) -> None:
    page = visit.page
    visit.answer_with({"error": {"message": "An API key is needed."}}, status=401, only_without="open-sesame")
    visit.hand_over(SHAPES)
    visit.ask("How big is the pink ring?")
    field = page.get_by_label("This server asks for an API key")
    expect(field).to_be_focused()
    unknown = page.get_by_text("The server does not know this key")
    expect(unknown).to_be_hidden()
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(unknown).to_be_visible()
    field.fill("open-sesame")
    page.keyboard.press("Enter")
    assert visit.answered().locator(".answer").inner_text()
    expect(field).to_be_hidden()
    assert page.evaluate("sessionStorage.getItem('opsin-key')") == "open-sesame"
    assert page.evaluate("localStorage.length") == 0
    assert visit.context.cookies() == []


def test_a_page_that_was_opened_too_early_finds_the_model_when_it_is_there(visit: Visit) -> None:
    page = visit.page
    page.route("**/v1/models", lambda route: route.fulfill(status=503, body="{}"))
    page.reload()
    expect(page.locator("#model")).to_have_text("loading the model…")
    page.unroute("**/v1/models")
    expect(page.locator("#model")).to_have_text("opsin-demo")


def test_where_the_encoder_ran_is_told_where_the_server_knows(visit: Visit) -> None:
    shares = {"CUDA0": {"nodes": 90, "share_of_ops": 0.97}, "CPU": {"nodes": 9, "share_of_ops": 0.03}}
    visit.page.route("**/props", lambda route: route.fulfill(body=json.dumps({"placement": {"encoder": shares}})))
    with visit.page.expect_response("**/props"):
        visit.page.reload()
    visit.answer_with(says("Yes.", "stop"), LAST)
    visit.ask("Is it?")
    expect(visit.answered().locator(".details")).to_contain_text("ran on CUDA0 (97 %) and CPU (3 %)")


def test_the_strip_shows_what_the_server_does_now(visit: Visit) -> None:
    page = visit.page
    replies = iter([100, 300])

    def metrics(route: Any) -> None:
        lines = [
            "# HELP opsin:num_requests_running 99",
            f'opsin:generation_tokens_total{{model="a b"}} {next(replies, 300)}',
            "opsin:num_requests_running 2.0",
            "opsin:num_requests_waiting 7.0",
            "opsin:kv_cache_usage_perc 0.25",
        ]
        route.fulfill(content_type="text/plain", body="\n".join(lines))

    page.route("**/metrics", metrics)
    page.reload()
    expect(page.locator("#running")).to_have_text("2")
    expect(page.locator("#waiting")).to_have_text("7")
    expect(page.locator("#kv")).to_have_text("25 %")
    # 200 tokens in about two seconds.
    expect(page.locator("#rate")).to_have_text(re.compile(r"^(8|9|10)\d(\.\d)?$"), timeout=5_000)


def test_the_servers_own_metrics_are_understood(visit: Visit) -> None:
    expect(visit.page.locator("#strip")).to_be_visible()
    expect(visit.page.locator("#kv")).to_have_text(re.compile(r"^\d+ %$"))


def test_the_strip_is_hidden_where_metrics_need_a_key(visit: Visit) -> None:
    visit.page.route("**/metrics", lambda route: route.fulfill(status=401, body="{}"))
    with visit.page.expect_response("**/metrics"):
        visit.page.reload()
    expect(visit.page.locator("#strip")).to_be_hidden()


LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 1000}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 1000}},
    "phone": {"color_scheme": "light", "viewport": {"width": 360, "height": 800}, "device_scale_factor": 2},
}


@pytest.mark.parametrize("look", LOOKS)
def test_the_page_fits_light_dark_and_phone(browser: Any, server: Any, look: str, shapes: Path, tmp_path: Path) -> None:
    visit = Visit(browser, server.base_url, reduced_motion="reduce", **LOOKS[look])
    page = visit.open()
    expect(page.locator("#strip")).to_be_visible()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= LOOKS[look]["viewport"]["width"]
    visit.hand_over(shapes)
    visit.ask("What do you see?")
    turn = visit.answered()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= LOOKS[look]["viewport"]["width"]
    ink, ground = page.evaluate(
        "() => { const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]; }"
    )
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, ground)]
    assert (brightness[0] > brightness[1]) == (look == "dark")
    assert turn.locator(".waterfall").bounding_box()["width"] <= LOOKS[look]["viewport"]["width"]
    expect(page.locator("#rate")).not_to_have_text("0", timeout=6_000)
    if look == "phone":
        turn.evaluate("turn => turn.scrollIntoView({ block: 'start' })")
    folder = Path(os.environ.get("PAGE_SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"page-{look}.png")
    visit.close()
