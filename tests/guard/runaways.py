"""Answers that will not end by themselves, made from a seed; written before the guard they test.

Three kinds, and plain cycles. Each knows at which token something is said for the second time: that is where the
guard's clock starts.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pieces import pieces, words

# Words an image's endless list drifts through: near-synonyms stand together.
CLUSTERS = [
    "imagesque scenic beautiful gorgeous lovely pretty stunning breathtaking charming",
    "idyllic peaceful calm tranquil serene quiet restful relaxing soothing",
    "inviting cozy comfortable warm homely welcoming snug pleasant",
    "patio terrace deck veranda balcony courtyard porch",
    "chairs seats stools benches loungers armchairs sofas cushions",
    "umbrella parasol sunshade awning canopy tent pavilion",
    "beach shore coast seaside sand dunes bay waterfront",
    "ocean sea waves surf water tide lagoon",
    "palm_trees palms trees bushes shrubs plants greenery foliage",
    "sunny bright clear blue_sky daylight sunshine radiant",
    "vacation holiday travel tourism getaway resort leisure",
    "modern stylish elegant chic contemporary sleek luxurious",
    "rustic traditional vintage antique classic old-fashioned quaint",
    "colorful vivid vibrant lively cheerful playful bold",
    "table desk counter sideboard shelf cabinet dresser",
    "street road avenue lane path alley sidewalk",
    "car truck bus van motorcycle bicycle scooter",
    "dog puppy cat kitten bird horse sheep",
    "kitchen oven stove sink fridge microwave toaster",
    "plate bowl cup glass fork spoon knife",
    "mountain hill valley forest meadow river lake",
    "person man woman child boy girl crowd",
]

OPENINGS = [
    "",
    "The image shows a ",
    "Keywords: ",
    "This image can be described as ",
    "In the scene there are ",
    "Tags for this photo: ",
    "Sure! Here is everything I can see:\n",
]
SEPARATORS = [",", ", ", ", ", "\n", "\n- ", "\n* ", "; "]


@dataclass(frozen=True)
class Runaway:
    """`first_repeat` is the index of the token with which the first repeated item begins."""

    kind: str
    seed: int
    tokens: list[tuple[int, str]]
    first_repeat: int

    @property
    def text(self) -> str:
        return "".join(piece for _, piece in self.tokens)


def _assemble(kind: str, seed: int, opening: str, items: Iterator[tuple[str, bool]], beyond: int = 500) -> Runaway:
    """Join items (text, said before) until `beyond` tokens after the first that was said before."""
    text, repeat_at, end = opening, None, None
    for item, again in items:
        if again and repeat_at is None:
            repeat_at = len(text)
            end = repeat_at + 7 * beyond
        text += item
        if end is not None and len(text) > end:
            break
    tokens = pieces(text, seed)
    offset = index = 0
    while offset + len(tokens[index][1]) <= repeat_at:
        offset += len(tokens[index][1])
        index += 1
    return Runaway(kind, seed, tokens[: index + beyond], index)


def _numbered(items: Iterator[tuple[str, bool]], separator: str) -> Iterator[tuple[str, bool]]:
    for number, (item, again) in enumerate(items, 1):
        yield (f"{number}. {item}\n" if separator == "#" else item + separator), again


def synonym_drift(seed: int) -> Runaway:
    """The founding case: 40 to 80 words of a few fields of meaning, first mostly new, then re-said in any order.

    The share of repeats grows as the words run out; it wanders between neighbours in meaning, and a word is never
    said again at once, so there is no cycle.
    """
    rng = random.Random(seed)
    clusters = [cluster.split() for cluster in CLUSTERS]
    rng.shuffle(clusters)
    drawn = [word for cluster in clusters for word in rng.sample(cluster, len(cluster))]
    vocabulary = list(dict.fromkeys(drawn))[: rng.randint(40, 80)]
    sharpness, avoid = rng.randint(6, 16), rng.randint(2, 8)

    def items() -> Iterator[tuple[str, bool]]:
        fresh = list(vocabulary)
        known: list[str] = []
        latest: deque[str] = deque(maxlen=avoid)
        while True:
            again = rng.random() < (len(known) / len(vocabulary)) ** sharpness
            if again:
                word = rng.choice([word for word in known if word not in latest])
            else:
                word = fresh.pop(min(len(fresh) - 1, rng.randrange(3)))
                known.append(word)
            yield word, again
            latest.append(word)

    separator = rng.choice(SEPARATORS)
    return _assemble("synonym drift", seed, rng.choice(OPENINGS), _numbered(items(), separator))


ADJECTIVES = words("red blue green small large wooden white black round old metal plastic yellow glass")
THINGS = words(
    "chair table lamp window door shelf book cup bottle plate clock mirror vase plant carpet curtain "
    "pillow box basket phone keyboard screen mouse bag coat hat shoe umbrella bench fence tree flower "
    "bird dog cat car bus"
)


def growing_list(seed: int) -> Runaway:
    """A list over 8 to 30 things that are named again and again; 1 to 5 items of 100 are new."""
    rng = random.Random(seed)
    things = rng.sample(THINGS, len(THINGS))
    if rng.random() < 0.5:
        things = [f"{rng.choice(ADJECTIVES)} {thing}" for thing in things]
    if rng.random() < 0.3:
        things = [f"a {thing}" for thing in things]
    base, rate = rng.randint(8, 30), rng.uniform(0.01, 0.05)

    def items() -> Iterator[tuple[str, bool]]:
        said = []
        while True:
            if len(said) < base or (rng.random() < rate and len(said) < len(things)):
                said.append(things[len(said)])
                yield said[-1], False
            else:
                yield rng.choice(said), True

    separator = rng.choice([*SEPARATORS, "#"])
    return _assemble("growing list", seed, rng.choice(OPENINGS), _numbered(items(), separator))


# A fact: who, does what, where; each with other words for the same.
FACTS = [
    ("a man|the man|a young man", "is riding a bicycle|rides his bike|is cycling", "down the street|along the road"),
    ("a woman|the woman|a lady", "is holding an umbrella|carries an umbrella", "over her head|in her right hand"),
    ("a dog|the brown dog|a small dog", "is running|runs happily|is playing", "on the grass|in the green field"),
    ("two children|the children|a boy and a girl", "are playing with a ball|play ball", "near the bench|by the bench"),
    ("several cars|a few cars|the cars", "are parked|stand parked|can be seen parked", "along the street|at the curb"),
    ("a traffic light|the traffic light", "is visible|can be seen|hangs", "above the crossing|over the intersection"),
    ("a clock|the large clock", "is mounted|hangs|has been placed", "on the wall|on the side of the building"),
    ("a bowl of fruit|the fruit bowl", "is placed|sits|stands", "in the middle of the table|on the wooden table"),
    ("a cat|the gray cat|a fluffy cat", "is lying|lies|is resting", "on the couch|on top of the sofa"),
    ("a group of people|many people", "are standing|stand|are gathered", "around the table|next to the food truck"),
    ("the sky|the clear sky", "is blue|looks blue and bright", "with a few clouds|with some white clouds"),
    ("a chef|the cook", "is preparing food|prepares a meal|is cooking", "in the kitchen|at the stove"),
    ("a surfer|the person on the board", "is riding a wave|rides the wave", "in the ocean|close to the shore"),
    ("a train|the red train", "is arriving|arrives|is pulling in", "at the station|at the platform"),
]
LEADS = ["", "", "", "", "In the image, ", "Additionally, ", "In the scene, ", "There, ", "Also, ", "Overall, "]


def paraphrase_loop(seed: int) -> Runaway:
    """Four to seven facts, each said once, and then again and again in any order, each in three to six wordings."""
    rng = random.Random(seed)
    facts = rng.sample(FACTS, rng.randint(4, 7))
    wordings = []
    for fact in facts:
        made: set[str] = set()
        for _ in range(rng.randint(3, 6)):
            who, what, where = (rng.choice(side.split("|")) for side in fact)
            order = rng.randrange(4)
            sentence = f"{where}, {who} {what}" if order == 0 else f"{who} {what} {where}"
            lead = rng.choice(LEADS)
            made.add((lead + sentence)[0].upper() + (lead + sentence)[1:] + ".")
        wordings.append(sorted(made))
    gap = rng.choice([" ", " ", " ", "\n", "\n\n"])

    def items() -> Iterator[tuple[str, bool]]:
        for sentences in wordings:
            yield rng.choice(sentences) + gap, False
        last = len(wordings) - 1
        while True:
            last = rng.choice([index for index in range(len(facts)) if index != last])
            yield rng.choice(wordings[last]) + gap, True

    return _assemble("paraphrase loop", seed, "", items())


def exact_cycle(seed: int) -> Runaway:
    """A lead-in, then a passage of 1 to 60 words again and again."""
    rng = random.Random(seed)
    pool = [word for cluster in CLUSTERS for word in cluster.split()]
    lead = " ".join(rng.sample(pool, rng.randint(0, 30)))
    passage = (
        " "
        + " ".join(rng.choices(pool, k=rng.choice([1, 2, 3, 5, 8, 13, 21, 34, 55])))
        + rng.choice([".", ",", "\n", ""])
    )

    def items() -> Iterator[tuple[str, bool]]:
        yield passage, False
        while True:
            yield passage, True

    return _assemble("exact cycle", seed, lead, items())


KINDS: dict[str, Callable[[int], Runaway]] = {
    "synonym drift": synonym_drift,
    "growing list": growing_list,
    "paraphrase loop": paraphrase_loop,
    "exact cycle": exact_cycle,
}

# The guard's constants were chosen by looking at these seeds; the tests use others.
TUNING_SEEDS = range(1000, 1050)
TEST_SEEDS = range(50)
