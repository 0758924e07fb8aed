"""Boxes as families write them, whole and broken: nothing is invented, and nothing raises."""

import random

import pytest

from opsin.boxes.answer import find_spots

SAME = (10.0, 20.0, 30.0, 40.0)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ('```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "cat"}]\n```', ["cat"]),
        ('{"label": "a \\"big\\" cat", "box_2d": [10.0, 20, 30, 40]}', ['a "big" cat']),
        ("[{'bbox': [10, 20, 30, 40], 'category': 'Title', 'text': 'Report (1, 2, 3, 4)'}]", ["Title"]),
        ('{"objects": [{"bbox_2d": [[10,20,30,40],[10,20,30,40]], "name": "x"}]}', ["x", "x"]),
        ("Two <ref>cats</ref><box>[[10, 20, 30, 40], [10, 20, 30, 40]]</box> here", ["cats", "cats"]),
        ("<|object_ref_start|>cat<|object_ref_end|><|box_start|>(10,20),(30,40)<|box_end|>", ["cat"]),
        ("<|ref|>title<|/ref|><|det|>[[10, 20, 30, 40]]<|/det|>\n# Report", ["title"]),
        ("<ref>cat</ref><box>10 20 30 40</box>", ["cat"]),
        # As llama.cpp writes them where the tags are control tokens.
        ("cat(10,20),(30,40)\ndog(10,20),(30,40)", ["cat", "dog"]),
        ("title[[10, 20, 30, 40]]\n# Report (2) [3]\n\ntext[[10, 20, 30, 40]]\nmore", ["title", "text"]),
        ("The cat is at [10, 20, 30, 40].", ["The cat is at"]),
        ("[10, 20, 30, 40]", [""]),
    ],
)
def test_each_way_to_write_a_box_is_read(text: str, labels: list[str]) -> None:
    spots, unread = find_spots(text)
    assert ([spot.label for spot in spots], unread) == (labels, 0)
    assert all(spot.numbers == SAME for spot in spots)
    assert all(spot.scale is spot.y_first is None for spot in spots)


def test_location_tokens_bring_their_own_scale_and_order() -> None:
    paligemma = find_spots("<loc0012><loc0034><loc0056><loc0078> cat ; <loc0001><loc0002><loc0003><loc0004> dog")[0]
    assert [(one.label, one.scale, one.y_first) for one in paligemma] == [("cat", 1024, True), ("dog", 1024, True)]
    florence = find_spots("cat<loc_12><loc_34><loc_56><loc_78>dog<loc_1><loc_2><loc_3><loc_4>")[0]
    assert [(one.label, one.scale, one.y_first) for one in florence] == [("cat", 1000, False), ("dog", 1000, False)]
    assert florence[0].numbers == paligemma[0].numbers == (12.0, 34.0, 56.0, 78.0)


@pytest.mark.parametrize("text", ['[{"point_2d": [3.5, 4], "label": "p"}]', "<ref>p</ref><point>3.5 4</point>"])
def test_points_have_two_numbers(text: str) -> None:
    spots, unread = find_spots(text)
    assert ([(one.label, one.numbers) for one in spots], unread) == ([("p", (3.5, 4.0))], 0)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ('[{"bbox_2d": [10, 20, 30, 40], "label": "cat"}, {"bbox_2d": [5, 6, 7', 1),
        ('[{"bbox_2d": [10, 20, 30, 40], "label": "cat"}, {"bbox_2d": [5, 6, 7, 8', 1),  # maybe 800
        ("[[10, 20, 30, 40], [5, 6, 7, 8", 1),
        ("<ref>cat</ref><box>10 20 30 40", 0),
        ('{"bbox_2d": null, "label": "cat"}', 0),
        ('{"bbox_2d": [1, 2, 3, 4, 5]}', 0),
        ("[1, 2, 3]", 0),
    ],
)
def test_what_is_broken_is_counted_and_left_out(text: str, whole: int) -> None:
    spots, unread = find_spots(text)
    assert [spot.numbers for spot in spots] == [SAME] * whole
    assert unread == 1


def test_prose_without_boxes_has_none() -> None:
    for text in ("", "A cat (black) on a mat [1].", "It is 3:15, and (2, 3) is a pair.", "[] () {}"):
        assert find_spots(text) == ([], 0)


def test_any_mixture_of_pieces_is_read_without_an_error() -> None:
    pieces = ["[", "]", "(", ")", "{", "}", "<box>", "</box>", '"bbox_2d":', '"label": "', '"', "\\", "1", "-2.5", ",",
              " ", "\n", "<loc0001>", "<loc_7>", "<|det|>", "<ref>", "½", "9" * 400]  # fmt: skip
    rng = random.Random(3)
    for _ in range(2000):
        spots, unread = find_spots("".join(rng.choices(pieces, k=rng.randrange(40))))
        assert unread >= 0
        assert all(len(spot.numbers) in {2, 4} for spot in spots)


@pytest.mark.parametrize("piece", ["[", '"bbox_2d": [', '{"label": "', "<loc_1>", "<box>", "1, ", '"box" ', "[1,2,3,4"])
def test_long_answers_take_no_long_time(piece: str) -> None:
    find_spots(piece * (100_000 // len(piece)))
