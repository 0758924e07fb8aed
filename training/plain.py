"""Pictures drawn without the scene renderer: 640x640, white, named colours, no smoothing.

They test that the model reads drawings in general and not only its own renderer's.
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageColor, ImageDraw

from training.scenes import COLOURS, SHAPES, UNSEEN_PAIRS, Scene, Thing

SIDE = 640
COUNT = 60


def _star(x: float, y: float, r: float) -> list[tuple[float, float]]:
    reach = (r, 0.42 * r)
    return [
        (x + reach[i % 2] * math.sin(i * math.pi / 5), y - reach[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)
    ]


def _draw(draw: ImageDraw.ImageDraw, shape: str, colour: str, x: int, y: int, r: int) -> None:
    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "ring":
        draw.ellipse(box, outline=colour, width=max(6, r // 3))
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=colour)
    elif shape == "star":
        draw.polygon(_star(x, y, r), fill=colour)
    else:
        arm = r // 3
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=colour)
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=colour)


def plain(index: int) -> tuple[Image.Image, Scene]:
    """Picture `index` and the scene it shows."""
    rng = random.Random(9_000_000_000 + index)
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(picture)
    cells = sorted(rng.sample(range(9), 1 + index % 6))
    things = []
    for cell in cells:
        pair = rng.choice([(c, s) for c in COLOURS for s in SHAPES if (c, s) not in UNSEEN_PAIRS])
        size = rng.choice(("small", "large"))
        r = {"small": 48, "large": 82}[size]
        x = SIDE * (2 * (cell % 3) + 1) // 6 + rng.randint(-8, 8)
        y = SIDE * (2 * (cell // 3) + 1) // 6 + rng.randint(-8, 8)
        _draw(draw, pair[1], pair[0], x, y, r)
        rgb = ImageColor.getrgb(pair[0])
        things.append(Thing(*pair, size, cell, 0, 0, r * 3 / SIDE, 0, 0.5, rgb))
    return picture, Scene(index, tuple(things), None, (255, 255, 255), None, 0, False, SIDE)
