"""Pre-rendered scenes on disk (a memory-mapped array) with the labels of the vision stage."""

from __future__ import annotations

import argparse
from multiprocessing import Pool
from pathlib import Path

import numpy as np

from training.scenes import COLOURS, IMAGE_SIZE, SHAPES, SIZES, Scene, make_scene, model_input

SHAPE_NONE, SHAPE_TEXT = 0, len(SHAPES) + 1
N_SHAPE_CLASSES = len(SHAPES) + 2
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
N_CHARS = len(ALPHABET) + 1  # 0 is "no character here"
N_SLOTS = 5
CHUNK = 2000
ROW_LABEL = 9 * 3 + N_SLOTS
LABELS = ROW_LABEL + 1


def labels_of(scene: Scene) -> np.ndarray:
    """9 shape classes, 9 colours, 9 sizes (-1 without an object), 5 characters, text row."""
    shape = np.zeros(9, np.int8)
    colour = np.full(9, -1, np.int8)
    size = np.full(9, -1, np.int8)
    chars = np.zeros(N_SLOTS, np.int8)
    row = -1
    for thing in scene.things:
        shape[thing.cell] = 1 + SHAPES.index(thing.shape)
        colour[thing.cell] = COLOURS.index(thing.colour)
        size[thing.cell] = SIZES.index(thing.size)
    if scene.sign:
        row = scene.sign.row
        shape[3 * row : 3 * row + 3] = SHAPE_TEXT
        for i, letter in enumerate(scene.sign.text):
            chars[i] = 1 + ALPHABET.index(letter)
    return np.concatenate([shape, colour, size, chars, [row]]).astype(np.int8)


def _chunk(job: tuple[str, int, int]) -> tuple[int, np.ndarray, np.ndarray]:
    split, start, count = job
    scenes = [make_scene(split, i) for i in range(start, start + count)]
    pictures = np.stack([model_input(s) for s in scenes])
    return start, pictures, np.stack([labels_of(s) for s in scenes])


def render_split(folder: Path, split: str, count: int, workers: int) -> None:
    """Write `count` scenes of a split; scenes already there are kept, so a run can go on."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures_at, labels_at = folder / f"{split}.u8", folder / f"{split}.i8"
    picture_bytes = IMAGE_SIZE * IMAGE_SIZE * 3
    done = labels_at.stat().st_size // LABELS if labels_at.exists() else 0
    jobs = [(split, i, min(CHUNK, count - i)) for i in range(done, count, CHUNK)]
    with pictures_at.open("ab") as pictures, labels_at.open("ab") as labels, Pool(workers) as pool:
        pictures.truncate(done * picture_bytes)
        for start, block, answer in pool.imap(_chunk, jobs):
            pictures.write(block.tobytes())
            pictures.flush()
            labels.write(answer.tobytes())
            labels.flush()
            print(split, start + len(block), flush=True)


def open_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The (pictures, labels) of the scenes rendered so far."""
    labels = np.fromfile(folder / f"{split}.i8", np.int8).reshape(-1, LABELS)
    shape = (len(labels), IMAGE_SIZE, IMAGE_SIZE, 3)
    return np.memmap(folder / f"{split}.u8", np.uint8, "r", shape=shape), labels


def main() -> None:
    """Render the validation, unseen and training scenes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=120_000)
    parser.add_argument("--val", type=int, default=2_000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    render_split(args.out / "scenes", "val", args.val, args.workers)
    render_split(args.out / "scenes", "unseen", 1_000, args.workers)
    render_split(args.out / "scenes", "train", args.train, args.workers)


if __name__ == "__main__":
    main()
