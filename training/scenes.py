"""Seeded drawn scenes: what the demo model is trained and judged on.

A scene is up to six coloured shapes on a 3x3 grid over a light ground; some scenes carry one
row of large text (a number or a word in capitals). `make_scene` decides everything from a seed,
`render` draws it at any size with Pillow, `model_input` gives the exact pixels the model sees.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.words import COMMON_WORDS

IMAGE_SIZE = 120
PAD_COLOUR = (122, 116, 104)

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
CELLS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
ROWS = ("top", "middle", "bottom")

# Never drawn in a training scene; evaluation reports them apart.
UNSEEN_PAIRS = frozenset(
    {
        ("orange", "star"),
        ("green", "ring"),
        ("purple", "square"),
        ("pink", "triangle"),
        ("black", "cross"),
    }
)

# Disjoint seed ranges: a split's scene i is drawn from seed start + i.
SPLITS = {"train": 0, "val": 1_000_000_000, "heldout": 2_000_000_000, "unseen": 3_000_000_000}

# Several anchors a colour, so that pictures made with other palettes (CSS names) work too.
PALETTE: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((220, 40, 40), (255, 0, 0), (200, 20, 45), (230, 60, 50)),
    "orange": ((245, 140, 30), (255, 165, 0), (255, 140, 0), (240, 125, 40)),
    "yellow": ((245, 215, 40), (255, 255, 0), (255, 235, 60), (250, 220, 0)),
    "green": ((50, 160, 70), (0, 128, 0), (0, 200, 0), (90, 180, 60), (0, 255, 0)),
    "blue": ((45, 90, 210), (0, 0, 255), (30, 60, 170), (60, 130, 230)),
    "purple": ((130, 60, 170), (128, 0, 128), (150, 70, 200), (110, 40, 150)),
    "pink": ((240, 130, 180), (255, 192, 203), (255, 105, 180), (250, 160, 190)),
    "black": ((30, 30, 30), (0, 0, 0), (15, 15, 20), (40, 40, 42)),
}
GROUNDS = ((255, 255, 255), (255, 255, 255), (245, 245, 245), (232, 232, 232), (218, 220, 222),
           (245, 240, 225), (236, 228, 208), (228, 238, 246), (232, 244, 232), (246, 234, 232),
           (240, 234, 246))  # fmt: skip
INKS = ((20, 20, 20), (0, 0, 0), (25, 35, 90), (90, 20, 25), (20, 70, 35), (60, 60, 64))
TEXTURES = ("stripes", "dots", "checks", "gradient", "noise")


@dataclass(frozen=True)
class Thing:
    """One object. Lengths are in cell units, (dx, dy) is the offset from the cell's middle."""

    colour: str
    shape: str
    size: str
    cell: int
    dx: float
    dy: float
    radius: float
    rotation: float
    proportion: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Sign:
    """One row of text; height is the capitals' height in cell units."""

    row: int
    text: str
    font: int
    height: float
    tracking: float
    dx: float
    dy: float
    rgb: tuple[int, int, int]

    @property
    def is_number(self) -> bool:
        """Whether the sign carries digits."""
        return self.text.isdigit()


@dataclass(frozen=True)
class Scene:
    """All that one picture shows."""

    seed: int
    things: tuple[Thing, ...]
    sign: Sign | None
    ground: tuple[int, int, int]
    texture: str | None
    texture_seed: int
    landscape: bool
    draw_size: int  # the size training draws at before the model's own resize

    def at(self, cell: int) -> Thing | None:
        """The object in a cell, if any."""
        return next((t for t in self.things if t.cell == cell), None)


def is_unseen_word(word: str) -> bool:
    """A fixed tenth of all words is kept out of training."""
    return not word.isdigit() and zlib.crc32(word.encode()) % 10 == 0


def _word(rng: random.Random, unseen: bool) -> str:
    while True:
        if rng.random() < 0.5:
            word = rng.choice(COMMON_WORDS)
        else:
            word = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(3, 5)))
        if is_unseen_word(word) == unseen:
            return word


def _sign(rng: random.Random, unseen: bool) -> Sign:
    if not unseen and rng.random() < 0.35:
        digits = rng.choice((1, 2, 2, 3, 3))
        low = 10 ** (digits - 1) if digits > 1 else 0
        text = str(rng.randint(low, 10**digits - 1))
    else:
        text = _word(rng, unseen)
    return Sign(
        row=rng.randrange(3),
        text=text,
        font=rng.randrange(len(FONTS)),
        height=rng.uniform(0.46, 0.66),
        tracking=rng.uniform(0.04, 0.16),
        dx=rng.uniform(-0.08, 0.08),
        dy=rng.uniform(-0.08, 0.08),
        rgb=rng.choice(INKS),
    )


def _thing(rng: random.Random, cell: int, pair: tuple[str, str]) -> Thing:
    size = rng.choice(SIZES)
    radius = rng.uniform(0.20, 0.26) if size == "small" else rng.uniform(0.36, 0.46)
    room = max(0.04, min(0.2, 0.5 - radius))
    colour, shape = pair
    turn = {"square": 20, "triangle": 20, "star": 36, "cross": 20}.get(shape, 0)
    rotation = rng.uniform(-turn, turn) if rng.random() < 0.7 else 0.0
    if shape == "triangle" and rng.random() < 0.2:
        rotation += 180
    rgb = tuple(max(0, min(255, c + rng.randint(-10, 10))) for c in rng.choice(PALETTE[colour]))
    return Thing(
        colour, shape, size, cell,
        dx=rng.uniform(-room, room), dy=rng.uniform(-room, room),
        radius=radius, rotation=rotation, proportion=rng.random(), rgb=rgb,
    )  # fmt: skip


def _pair(rng: random.Random, unseen: bool) -> tuple[str, str]:
    if unseen:
        return rng.choice(sorted(UNSEEN_PAIRS))
    while True:
        pair = (rng.choice(COLOURS), rng.choice(SHAPES))
        if pair not in UNSEEN_PAIRS:
            return pair


def _pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Seen pairs; some scenes repeat a colour or a shape on purpose, so that counting matters."""
    pairs = [_pair(rng, False) for _ in range(count)]
    if count > 1 and rng.random() < 0.45:
        shared = rng.randrange(3)
        for i in range(1, count):
            if rng.random() < 0.6:
                colour, shape = pairs[i]
                same = (pairs[0][0], shape) if shared == 0 else (colour, pairs[0][1])
                same = pairs[0] if shared == 2 and rng.random() < 0.5 else same
                pairs[i] = same if same not in UNSEEN_PAIRS else pairs[i]
    return pairs


def make_scene(split: str, index: int, sign_share: float = 0.4) -> Scene:
    """Scene `index` of a split; the same arguments always give the same scene.

    The split "unseen" holds scenes with one unseen colour-shape pair or one unseen word each.
    """
    seed = SPLITS[split] + index
    rng = random.Random(seed)
    unseen = split == "unseen"
    sign = _sign(rng, unseen) if rng.random() < sign_share else None
    free = [c for c in range(9) if sign is None or c // 3 != sign.row]
    count = rng.randint(1, 6) if sign is None else rng.randint(0, 3)
    cells = sorted(rng.sample(free, count))
    pairs = _pairs(rng, count)
    if unseen and sign is None:
        pairs[rng.randrange(count)] = _pair(rng, True)
    things = tuple(_thing(rng, c, p) for c, p in zip(cells, pairs, strict=True))
    ground = tuple(max(0, min(255, c + rng.randint(-5, 5))) for c in rng.choice(GROUNDS))
    texture = rng.choice(TEXTURES) if rng.random() < 0.35 else None
    landscape = rng.random() < 0.08
    draw_size = rng.randint(160, 480) if landscape or rng.random() < 0.15 else IMAGE_SIZE
    return Scene(
        seed, things, sign, ground, texture, rng.randrange(1 << 30), landscape, draw_size
    )  # fmt: skip


def _font_files() -> tuple[Path | None, ...]:
    import matplotlib as mpl

    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    names = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif",
             "DejaVuSerif-Bold", "STIXGeneralBol")  # fmt: skip
    return (None, None, *(folder / f"{name}.ttf" for name in names))


FONTS = _font_files()  # None is Pillow's built-in font


@lru_cache(maxsize=512)
def _font(index: int, capital_height: int) -> ImageFont.FreeTypeFont:
    """The font at the size whose capital H is about `capital_height` pixels high."""

    def load(size: float) -> ImageFont.FreeTypeFont:
        path = FONTS[index]
        return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)

    box = load(100).getbbox("H")
    return load(100 * capital_height / (box[3] - box[1]))


def _ground(scene: Scene, width: int, height: int) -> np.ndarray:
    base = np.empty((height, width, 3), np.float32)
    base[:] = scene.ground
    if scene.texture is None:
        return base.astype(np.uint8)
    rng = random.Random(scene.texture_seed)
    depth = rng.uniform(5, 16)
    period = rng.uniform(0.04, 0.12) * width
    x = np.arange(width, dtype=np.float32)[None, :]
    y = np.arange(height, dtype=np.float32)[:, None]
    if scene.texture == "stripes":
        angle = rng.uniform(0, math.pi)
        wave = ((x * math.cos(angle) + y * math.sin(angle)) / period) % 1.0 < 0.5
    elif scene.texture == "dots":
        wave = ((x / period) % 1 - 0.5) ** 2 + ((y / period) % 1 - 0.5) ** 2 < 0.06
    elif scene.texture == "checks":
        wave = ((x // period).astype(int) + (y // period).astype(int)) % 2 == 0
    elif scene.texture == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        wave = (x * math.cos(angle) + y * math.sin(angle)) / width + 0.5
    else:
        noise = np.random.default_rng(scene.texture_seed).standard_normal((60, 60), np.float32)
        wave = np.clip(noise * 0.5, -1, 1)
        wave = wave[(y * 60 // height).astype(int), (x * 60 // width).astype(int)]
    base -= depth * np.asarray(wave, np.float32)[:, :, None]
    return np.clip(base, 0, 255).astype(np.uint8)


def outline(thing: Thing) -> list[tuple[float, float]]:
    """Corners of a polygon shape around (0, 0), in cell units."""
    r, p = thing.radius, thing.proportion
    turn = math.radians(thing.rotation)
    if thing.shape == "square":
        s = 0.84 * r
        points = [(-s, -s), (s, -s), (s, s), (-s, s)]
    elif thing.shape == "triangle":
        wide = (0.85 + 0.3 * p) * r
        points = [(0, -1.0 * r), (wide, 0.8 * r), (-wide, 0.8 * r)]
    elif thing.shape == "star":
        inner = (0.38 + 0.12 * p) * r
        points = []
        for i in range(10):
            reach = 1.12 * r if i % 2 == 0 else inner * 1.12
            angle = math.pi * i / 5
            points.append((reach * math.sin(angle), -reach * math.cos(angle)))
    else:  # cross
        a, r = (0.24 + 0.12 * p) * r, 1.02 * r
        points = [(-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a),
                  (a, r), (-a, r), (-a, a), (-r, a), (-r, -a), (-a, -a)]  # fmt: skip
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def _draw_thing(picture: Image.Image, thing: Thing, ss: int) -> None:
    cell_w, cell_h = picture.width / 3, picture.height / 3
    unit = min(cell_w, cell_h)
    cx = (thing.cell % 3 + 0.5) * cell_w + thing.dx * unit
    cy = (thing.cell // 3 + 0.5) * cell_h + thing.dy * unit
    reach = math.ceil(thing.radius * unit * 1.2) + 1
    left, top = math.floor(cx) - reach, math.floor(cy) - reach
    side = 2 * reach + 1
    mask = Image.new("L", (side * ss, side * ss))
    draw = ImageDraw.Draw(mask)
    mx, my = (cx - left) * ss, (cy - top) * ss
    scale = unit * ss
    if thing.shape in ("circle", "ring"):
        r = thing.radius * scale
        draw.ellipse((mx - r, my - r, mx + r, my + r), fill=255)
        if thing.shape == "ring":
            r *= 0.5 + 0.2 * thing.proportion
            draw.ellipse((mx - r, my - r, mx + r, my + r), fill=0)
    else:
        draw.polygon([(mx + x * scale, my + y * scale) for x, y in outline(thing)], fill=255)
    picture.paste(thing.rgb, (left, top), mask.reduce(ss))


def _draw_sign(picture: Image.Image, sign: Sign, ss: int) -> None:
    cell_h = picture.height / 3
    unit = min(picture.width / 3, cell_h) * ss
    font = _font(sign.font, max(6, round(sign.height * unit)))
    gap = sign.tracking * unit
    advances = [font.getlength(c) for c in sign.text]
    width = sum(advances) + gap * (len(sign.text) - 1)
    limit = picture.width * ss * 0.94
    if width > limit:  # too wide for the row: shrink the letters, keep the proportions
        font = _font(sign.font, max(6, math.floor(sign.height * unit * limit / width)))
        gap *= limit / width
        advances = [font.getlength(c) for c in sign.text]
        width = sum(advances) + gap * (len(sign.text) - 1)
    box = font.getbbox("H")
    mask = Image.new("L", (picture.width * ss, math.ceil(cell_h) * ss))
    draw = ImageDraw.Draw(mask)
    slack = max(0.0, (limit - width) / 2)
    x = (mask.width - width) / 2 + max(-slack, min(slack, sign.dx * unit))
    y = mask.height / 2 - (box[1] + box[3]) / 2 + sign.dy * unit
    for letter, advance in zip(sign.text, advances, strict=True):
        draw.text((x, y), letter, fill=255, font=font)
        x += advance + gap
    picture.paste(sign.rgb, (0, round(sign.row * cell_h)), mask.reduce(ss))


def render(scene: Scene, size: int = 448, ss: int | None = None) -> Image.Image:
    """Draw a scene `size` pixels wide (landscape scenes are 4:3), supersampled `ss` times."""
    height = size * 3 // 4 if scene.landscape else size
    ss = ss or (4 if size < 200 else 2)
    picture = Image.fromarray(_ground(scene, size, height))
    for thing in scene.things:
        _draw_thing(picture, thing, ss)
    if scene.sign:
        _draw_sign(picture, scene.sign, ss)
    return picture


def fit(picture: Image.Image) -> np.ndarray:
    """The runtime's own resize: bicubic, longer side to the model's size, padded to a square."""
    scale = min(IMAGE_SIZE / picture.width, IMAGE_SIZE / picture.height)
    width = min(math.ceil(picture.width * scale), IMAGE_SIZE)
    height = min(math.ceil(picture.height * scale), IMAGE_SIZE)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    out = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    out[:] = PAD_COLOUR
    top, left = (IMAGE_SIZE - height) // 2, (IMAGE_SIZE - width) // 2
    out[top : top + height, left : left + width] = np.asarray(picture.convert("RGB"))
    return out


def model_input(scene: Scene) -> np.ndarray:
    """The 120x120x3 bytes that training shows the model."""
    return fit(render(scene, scene.draw_size))
