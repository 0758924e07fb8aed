"""From written numbers to pixels of the file: borders, regions, orientation, edges, and refusals."""

from dataclasses import replace

import pytest

from opsin.boxes import check_boxes, with_boxes
from opsin.boxes.answer import frame, read_boxes
from opsin.core.answer import Answer, Box, ImageInfo, Stages, Timings, Usage
from opsin.core.errors import BadParameter
from opsin.core.model_info import ModelInfo

WHOLE = ImageInfo("0" * 64, 1000, 500, 560, 280, 100)
# Wider than it is high: mtmd puts 14 rows above and below.
BORDERED = replace(WHOLE, resized_height=308)


def model(projector: str | None) -> ModelInfo:
    return ModelInfo("some", "some", projector, "some.gguf", None, "f16")


def edges(text: str, projector: str, image: ImageInfo = WHOLE) -> list[tuple[float, ...]]:
    boxes, _ = read_boxes(text, check_boxes(model(projector)), image)
    return [(box.x1, box.y1, box.x2, box.y2) for box in boxes]


@pytest.mark.parametrize(
    ("projector", "text"),
    [
        ("qwen2.5vl_merger", "[56, 28, 280, 140]"),
        ("dots_ocr", "[56, 28, 280, 140]"),
        ("qwen3vl_merger", "[100, 100, 500, 500]"),
        ("qwen2vl_merger", "(100,100),(500,500)"),
        ("internvl", "[[100, 100, 500, 500]]"),
        ("resampler", "<box>100 100 500 500</box>"),
        ("deepseekocr", "[[99.9, 99.9, 499.5, 499.5]]"),
        ("gemma4v", '[{"box_2d": [100, 100, 500, 500]}]'),
        ("glm4v", "[[100,100,500,500]]"),
    ],
)
def test_each_family_has_its_own_scale(projector: str, text: str) -> None:
    assert edges(text, projector) == [(100.0, 50.0, 500.0, 250.0)]


def test_y_comes_first_where_the_family_says_so() -> None:
    assert edges('{"box_2d": [100, 200, 300, 400]}', "gemma4v") == [(200.0, 50.0, 400.0, 150.0)]
    assert edges('{"point": [100, 200]}', "gemma4v") == [(200.0, 50.0, 200.0, 50.0)]
    assert edges("<loc0256><loc0512><loc0512><loc1023>", "qwen3vl_merger") == [(500.0, 125.0, 999.0, 250.0)]


def test_borders_are_taken_off_where_the_frame_has_them() -> None:
    start, size = frame(check_boxes(model("qwen2.5vl_merger")), BORDERED)
    assert (start.tolist(), size.tolist()) == ([0, 14], [560, 280])
    assert edges("[56, 42, 280, 154]", "qwen2.5vl_merger", BORDERED) == [(100.0, 50.0, 500.0, 250.0)]
    assert edges("[100, 100, 500, 500]", "internvl", BORDERED) == [(100.0, 50.0, 500.0, 250.0)]


def test_a_region_and_a_smaller_reading_are_undone() -> None:
    small = replace(WHOLE, source_size=(8000, 4000))
    assert edges("[100, 100, 500, 500]", "qwen3vl_merger", small) == [(800.0, 400.0, 4000.0, 2000.0)]
    part = replace(small, region=(1000, 200, 2000, 1000))
    assert edges("[100, 100, 500, 500]", "qwen3vl_merger", part) == [(1200.0, 300.0, 2000.0, 700.0)]


def test_swapped_corners_are_put_in_order_and_edges_cut_at_the_image() -> None:
    assert edges("[500, 500, 100, 100]", "qwen3vl_merger") == [(100.0, 50.0, 500.0, 250.0)]
    assert edges("[-50, 900, 200, 1200]", "qwen3vl_merger") == [(0.0, 450.0, 200.0, 500.0)]


def test_what_is_no_box_in_the_image_is_left_out_with_a_note() -> None:
    outside, flat, huge = "[1500, 0, 1700, 100]", "[5, 5, 5, 9]", f"[0, 0, {'9' * 400}, 5]"
    good = "[100, 100, 500, 500]"
    text = f"{outside}\n{flat}\n{huge}\n{good}\n[1, 2"
    answer = Answer(text, None, "stop", Usage(), Stages(), Timings(0, 0, 0, 0, 0, 0, 0, 0, 0), (WHOLE,))
    found = with_boxes(answer, model("qwen3vl_merger"))
    assert found.boxes == (Box("", 100.0, 50.0, 500.0, 250.0),)
    assert [note for note in found.images[0].notes if "4 boxes or points were left out" in note]
    assert with_boxes(replace(answer, text="none"), model("qwen3vl_merger")).boxes == ()
    assert with_boxes(replace(answer, text=good), model("qwen3vl_merger")).images == (WHOLE,)


def test_an_unknown_convention_is_refused_by_its_name() -> None:
    for projector in ("mlp", "unknown", None):
        with pytest.raises(BadParameter, match=projector or "none"):
            check_boxes(model(projector))
    with pytest.raises(BadParameter, match="there are 2"):
        check_boxes(model("internvl"), 2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_turned_back_as_pillow_turns_images(orientation: int) -> None:
    from PIL import Image, ImageOps

    stored = Image.new("L", (40, 30))
    stored.paste(255, (5, 7, 12, 20))
    exif = stored.getexif()
    exif[0x0112] = orientation
    upright = ImageOps.exif_transpose(stored)
    found = upright.getbbox()
    assert found is not None
    info = replace(WHOLE, width=upright.width, height=upright.height, orientation=orientation)
    assert Box("", *found).stored(info) == Box("", 5, 7, 12, 20)
