"""Questions about a scene with their answers, and the judge of whether an answer is right.

Answers that need more than a look (yes or no, counts, relations) say what they rest on first and
end in "so ...": a model this small decides well only after it has written the facts down.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from training.scenes import CELLS, COLOURS, ROWS, SHAPES, SIZES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the center", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
ROW_PLACES = {"top": "at the top", "middle": "in the middle", "bottom": "at the bottom"}
COLUMN_PLACES = ("on the left", "in the center", "on the right")
RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "left of": lambda a, b: a % 3 < b % 3,
    "right of": lambda a, b: a % 3 > b % 3,
    "above": lambda a, b: a // 3 < b // 3,
    "below": lambda a, b: a // 3 > b // 3,
}
BLIND = "please show me a picture first."
ABOUT = "i am a small demo model, ask me about the shapes and signs in a picture."
TEMPLATES: dict[str, tuple[str, ...]] = {
    "describe": (
        "what is this?", "what is in this picture?", "what is in the picture?",
        "what is in this image?", "what is in the image?", "what do you see?",
        "describe the picture.", "describe this picture.", "describe the image.",
        "describe this image.", "what can you see?", "what does the picture show?",
        "what does this image show?", "tell me what you see.", "what is shown here?",
        "list the objects.", "list all objects.", "describe what you see.", "what's this?",
        "what objects are in the picture?", "which objects do you see?", "describe it.",
        "what shapes do you see?", "what's in this picture?", "what's in the picture?",
        "what's in this image?", "what's in the image?", "describe", "describe the scene.",
        "please describe this picture.", "please describe the image.", "what is here?",
        "describe this image in detail.", "describe the picture in detail.",
        "can you describe the picture?", "can you describe this image?",
        "what do you see in this picture?", "what do you see in this image?",
    ),
    "place": ("what is {place}?", "what's {place}?", "what do you see {place}?",
              "what object is {place}?", "which shape is {place}?", "what shape is {place}?"),
    "where": ("where is the {thing}?", "where's the {thing}?", "where do you see the {thing}?",
              "where can i find the {thing}?", "where in the picture is the {thing}?"),
    "colour": ("what color is the {shape}?", "what colour is the {shape}?",
               "which color is the {shape}?", "what is the color of the {shape}?",
               "which colour is the {shape}?", "what is the colour of the {shape}?",
               "what color does the {shape} have?"),
    "shape": ("what shape is the {colour} object?", "what shape is {colour}?",
              "which shape is {colour}?", "what is the {colour} thing?", "what is {colour}?",
              "what is the {colour} object?", "what shape is the {colour} thing?",
              "what is the shape of the {colour} object?", "which object is {colour}?"),
    "count": ("how many objects are there?", "how many shapes are there?", "how many objects?",
              "how many objects are in the picture?", "how many objects are in this image?",
              "how many things do you see?", "how many shapes are in this picture?",
              "how many shapes do you see?", "count the objects.", "count the shapes.",
              "how many objects do you see?"),
    "count_colour": ("how many {colour} objects are there?", "how many {colour} shapes are there?",
                     "how many objects are {colour}?", "how many {colour} things do you see?",
                     "how many {colour} objects do you see?", "count the {colour} objects.",
                     "how many {colour} objects are in the picture?"),
    "count_shape": ("how many {shapes} are there?", "how many {shapes} do you see?",
                    "how many {shapes} are in the picture?", "count the {shapes}.",
                    "how many {shapes}?", "how many {shapes} are in this image?"),
    "is_thing": ("is there a {thing}?", "do you see a {thing}?",
                 "is there a {thing} in the picture?", "can you see a {thing}?",
                 "is there a {thing} in this image?", "does the picture show a {thing}?"),
    "is_shape": ("is there a {shape}?", "do you see a {shape}?", "are there any {shapes}?",
                 "is there a {shape} in the picture?", "can you see a {shape}?",
                 "do you see any {shapes}?"),
    "is_colour": ("is there anything {colour}?", "is there a {colour} object?",
                  "do you see anything {colour}?", "is there a {colour} shape?",
                  "is anything {colour}?", "are there any {colour} objects?"),
    "relation": ("is the {thing} {relation} the {other}?",),
    "size": ("is the {thing} small or large?", "how big is the {thing}?",
             "is the {thing} large or small?", "what size is the {thing}?"),
    "number": ("what number is written?", "what number is this?", "what number do you see?",
               "which number is written?", "read the number.", "what is the number?",
               "which number do you see?", "what number is in the picture?"),
    "word": ("what word is written?", "which word is written?", "what word do you see?",
             "read the word.", "what is the word?", "what word is in the picture?"),
    "sign": ("what does the sign say?", "what is written?", "what does it say?", "read the text.",
             "read the sign.", "what text do you see?", "what is written in the picture?",
             "what does the text say?", "what text is in the picture?", "what is the text?",
             "can you read the sign?", "what is written here?"),
    "about": ("hello", "hi", "who are you?", "what are you?", "what can you do?", "help", "hey",
              "thanks", "thank you", "how are you?", "what is your name?"),
}  # fmt: skip
CLOSED = tuple(kind for kind in TEMPLATES if kind not in ("describe", "about"))


@dataclass(frozen=True)
class Question:
    """One question with the expected answer."""

    kind: str
    text: str
    answer: str
    truth: object  # what the judge compares with; its type goes with the kind


def name(thing: Thing) -> str:
    """Colour and shape."""
    return f"{thing.colour} {thing.shape}"


def listing(parts: Sequence[str]) -> str:
    """Join as in a sentence: a, b and c."""
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def _an(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def placed(things: Sequence[Thing]) -> list[str]:
    """Every object with its place."""
    return [f"{_an(name(t))} {PLACES[t.cell]}" for t in things]


def _describe(scene: Scene, _rng: random.Random) -> Question | None:
    parts = placed(scene.things)
    sign = scene.sign
    if sign:
        what = "number" if sign.is_number else "word"
        parts.append(f"the {what} {sign.text} {ROW_PLACES[ROWS[sign.row]]}")
    things = frozenset((t.colour, t.shape, PLACES[t.cell]) for t in scene.things)
    truth = (things, sign.text if sign else None)
    return Question("describe", "", listing(parts) + ".", truth)


def _place(scene: Scene, rng: random.Random) -> Question | None:
    sign = scene.sign
    if sign and rng.random() < 0.15:
        what = "number" if sign.is_number else "word"
        return Question("place", ROW_PLACES[ROWS[sign.row]], f"the {what} {sign.text}.", sign.text)
    cells = [c for c in range(9) if scene.sign is None or c // 3 != scene.sign.row]
    full = [t.cell for t in scene.things]
    cell = rng.choice(full) if full and rng.random() < 0.7 else rng.choice(cells)
    thing = scene.at(cell)
    place = PLACES[cell]
    if cell == 4 and rng.random() < 0.4:
        place = rng.choice(("in the middle", "in the centre"))
    elif cell in (0, 2, 6, 8) and rng.random() < 0.3:
        place = rng.choice(("in the {} corner", "in the {}")).format(CELLS[cell])
    answer = f"{_an(f'{thing.size} {name(thing)}')}." if thing else "nothing."
    truth = (thing.size, thing.colour, thing.shape) if thing else None
    return Question("place", place, answer, truth)


def _absent(scene: Scene, rng: random.Random) -> str:
    """A colour-shape pair that is not there, most often one that shares a part with the scene."""
    there = {name(t) for t in scene.things}
    while True:
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        if scene.things and rng.random() < 0.8:
            near = rng.choice(scene.things)
            colour, shape = (near.colour, shape) if rng.random() < 0.3 else (colour, near.shape)
        if f"{colour} {shape}" not in there:
            return f"{colour} {shape}"


def _unique(scene: Scene, key: Callable[[Thing], str]) -> list[Thing]:
    keys = [key(t) for t in scene.things]
    return [t for t in scene.things if keys.count(key(t)) == 1]


def _called(scene: Scene, thing: Thing, rng: random.Random) -> str:
    """A name for a thing: colour and shape, or one of them alone where that is enough."""
    ways = [name(thing)] * 3
    ways += [thing.shape for _ in range(1) if thing in _unique(scene, lambda t: t.shape)]
    ways += [f"{thing.colour} object" for _ in range(1) if thing in _unique(scene, lambda t: t.colour)]
    return rng.choice(ways)


def _where(scene: Scene, rng: random.Random) -> Question | None:
    sign = scene.sign
    if sign and rng.random() < 0.25:
        subject = rng.choice(("text", "sign", "number" if sign.is_number else "word"))
        place = ROW_PLACES[ROWS[sign.row]]
        return Question("where", subject, f"{place}.", place)
    if rng.random() < 0.12:
        pair = _absent(scene, rng)
        return Question("where", pair, f"there is no {pair}.", None)
    things = _unique(scene, name)
    if not things:
        return None
    thing = rng.choice(things)
    return Question("where", _called(scene, thing, rng), PLACES[thing.cell] + ".", PLACES[thing.cell])


def _colour(scene: Scene, rng: random.Random) -> Question | None:
    things = _unique(scene, lambda t: t.shape)
    if not things:
        return None
    thing = rng.choice(things)
    return Question("colour", thing.shape, thing.colour + ".", thing.colour)


def _shape(scene: Scene, rng: random.Random) -> Question | None:
    things = _unique(scene, lambda t: t.colour)
    if not things:
        return None
    thing = rng.choice(things)
    return Question("shape", thing.colour, f"a {thing.shape}.", thing.shape)


def _size(scene: Scene, rng: random.Random) -> Question | None:
    things = _unique(scene, name)
    if not things:
        return None
    thing = rng.choice(things)
    return Question("size", _called(scene, thing, rng), thing.size + ".", thing.size)


def _counted(kind: str, subject: str, things: list[Thing], none: str) -> Question:
    facts = listing(placed(things)) if things else f"no {none}"
    return Question(kind, subject, f"{facts}, so {NUMBERS[len(things)]}.", len(things))


def _count(scene: Scene, _rng: random.Random) -> Question | None:
    return _counted("count", "", list(scene.things), "objects")


def _some(rng: random.Random, there: list[str], every: Sequence[str]) -> str:
    return rng.choice(there) if there and rng.random() < 0.72 else rng.choice(every)


def _count_colour(scene: Scene, rng: random.Random) -> Question | None:
    colour = _some(rng, [t.colour for t in scene.things], COLOURS)
    things = [t for t in scene.things if t.colour == colour]
    return _counted("count_colour", colour, things, f"{colour} objects")


def _count_shape(scene: Scene, rng: random.Random) -> Question | None:
    shape = _some(rng, [t.shape for t in scene.things], SHAPES)
    things = [t for t in scene.things if t.shape == shape]
    return _counted("count_shape", shape, things, plural(shape))


def _checked(kind: str, subject: str, things: list[Thing], none: str, yes: bool) -> Question:
    facts = listing(placed(things)) if things else f"no {none}"
    return Question(kind, subject, f"{facts}, so {'yes' if yes else 'no'}.", yes)


def _is_thing(scene: Scene, rng: random.Random) -> Question | None:
    yes = bool(scene.things) and rng.random() < 0.5
    pair = name(rng.choice(scene.things)) if yes else _absent(scene, rng)
    shape = pair.split()[1]
    things = [t for t in scene.things if t.shape == shape]
    return _checked("is_thing", pair, things, plural(shape), yes)


def _is_shape(scene: Scene, rng: random.Random) -> Question | None:
    shape = _some(rng, [t.shape for t in scene.things], SHAPES)
    things = [t for t in scene.things if t.shape == shape]
    return _checked("is_shape", shape, things, plural(shape), bool(things))


def _is_colour(scene: Scene, rng: random.Random) -> Question | None:
    colour = _some(rng, [t.colour for t in scene.things], COLOURS)
    things = [t for t in scene.things if t.colour == colour]
    return _checked("is_colour", colour, things, f"{colour} objects", bool(things))


def _relation(scene: Scene, rng: random.Random) -> Question | None:
    things = _unique(scene, name)
    if len(things) < 2:
        return None
    a, b = rng.sample(things, 2)
    word = rng.choice(tuple(RELATIONS))
    if rng.random() < 0.45 and not RELATIONS[word](a.cell, b.cell):
        a, b = b, a  # else two of three answers would be no
    yes = RELATIONS[word](a.cell, b.cell)
    # Only the row or the column counts, so only that is said.
    at = [COLUMN_PLACES[t.cell % 3] if word.endswith("of") else ROW_PLACES[ROWS[t.cell // 3]] for t in (a, b)]
    answer = f"the {name(a)} is {at[0]} and the {name(b)} is {at[1]}, so {'yes' if yes else 'no'}."
    subject = f"{_called(scene, a, rng)}|{word}|{_called(scene, b, rng)}"
    return Question("relation", subject, answer, yes)


def _number(scene: Scene, rng: random.Random) -> Question | None:
    sign = scene.sign
    if sign and sign.is_number:
        return Question("number", "", sign.text + ".", sign.text)
    return Question("number", "", "there is no number.", None) if rng.random() < 0.3 else None


def _word(scene: Scene, rng: random.Random) -> Question | None:
    sign = scene.sign
    if sign and not sign.is_number:
        return Question("word", "", sign.text + ".", sign.text)
    return Question("word", "", "there is no word.", None) if rng.random() < 0.3 else None


def _sign(scene: Scene, rng: random.Random) -> Question | None:
    if scene.sign:
        return Question("sign", "", scene.sign.text + ".", scene.sign.text)
    return Question("sign", "", "there is no text.", None) if rng.random() < 0.3 else None


def _about(_scene: Scene, _rng: random.Random) -> Question | None:
    return Question("about", "", ABOUT, None)


MAKERS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "describe": _describe, "place": _place, "where": _where, "colour": _colour, "shape": _shape,
    "count": _count, "count_colour": _count_colour, "count_shape": _count_shape,
    "is_thing": _is_thing, "is_shape": _is_shape, "is_colour": _is_colour, "relation": _relation,
    "size": _size, "number": _number, "word": _word, "sign": _sign, "about": _about,
}  # fmt: skip
# How often a kind is asked, in scenes without and with a sign.
SHARES = {
    "describe": (15, 13), "place": (8, 6), "where": (7, 4), "colour": (4, 3), "shape": (4, 3),
    "count": (4, 3), "count_colour": (9, 3), "count_shape": (9, 3), "is_thing": (12, 4),
    "is_shape": (5, 3), "is_colour": (5, 3), "relation": (11, 4), "size": (5, 2),
    "number": (2, 10), "word": (2, 14), "sign": (2, 18), "about": (0.5, 0.5),
}  # fmt: skip


def plural(shape: str) -> str:
    """More than one of a shape."""
    return "crosses" if shape == "cross" else shape + "s"


def worded(question: Question, rng: random.Random) -> Question:
    """The question put into one of its kind's phrasings; half of them start with a capital."""
    text = rng.choice(TEMPLATES[question.kind])
    subject = question.text
    first, _, rest = subject.partition("|")
    relation, _, other = rest.partition("|")
    text = text.format(
        place=subject, thing=first, colour=subject, shape=subject, shapes=plural(subject),
        relation=relation, other=other,
    )  # fmt: skip
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.1 and text[-1] in "?.":
        text = text[:-1]
    return Question(question.kind, text, question.answer, question.truth)


def ask(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """A question of this kind, or None where the scene has nothing to ask it about."""
    question = MAKERS[kind](scene, rng)
    return worded(question, rng) if question else None


def ask_any(scene: Scene, rng: random.Random) -> Question:
    """A question of a random kind, as often as SHARES says."""
    column = 1 if scene.sign else 0
    weights = [share[column] for share in SHARES.values()]
    while True:
        kind = rng.choices(list(SHARES), weights)[0]
        question = ask(scene, kind, rng)
        if question:
            return question


def _alternatives(words: Sequence[str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_THING = re.compile(
    rf"\b(?:({_alternatives(SIZES)}) )?({_alternatives(COLOURS)}) ({_alternatives(SHAPES)})\b"
    rf"(?: ({_alternatives(PLACES)}))?"
)
_SIGN = re.compile(r"\bthe (?:word|number) (\w+)")


def _judge_text(truth: object, answer: str) -> bool:
    if truth is None:
        return "no " in answer
    return re.findall(r"\b(?:[A-Z]+|\d+)\b", answer) == [truth]


def _judge_describe(truth: object, answer: str) -> bool:
    wanted, text = truth  # type: ignore[misc]
    listed = [(colour, shape, place) for _, colour, shape, place in _THING.findall(answer.lower())]
    return sorted(listed) == sorted(wanted) and _SIGN.findall(answer) == ([text] if text else [])


def _judge_place(truth: object, answer: str) -> bool:
    things = [thing[:3] for thing in _THING.findall(answer.lower())]
    if truth is None:
        return "nothing" in answer.lower() and not things
    return _judge_text(truth, answer) if isinstance(truth, str) else things == [truth]


def _judge_where(truth: object, answer: str) -> bool:
    if truth is None:
        return "no " in answer.lower()
    return re.findall(_alternatives((*PLACES, "in the middle")), answer.lower()) == [truth]


def _judge_count(truth: object, answer: str) -> bool:
    numbers = re.findall(rf"\b(?:{_alternatives(NUMBERS)}|\d+)\b", answer.lower())
    return numbers[-1:] in ([NUMBERS[int(str(truth))]], [str(truth)])


def _judge_yes_no(truth: object, answer: str) -> bool:
    return re.findall(r"\b(?:yes|no)\b", answer.lower())[-1:] == ["yes" if truth else "no"]


def _judge_one_of(words: Sequence[str]) -> Callable[[object, str], bool]:
    return lambda truth, answer: set(re.findall(rf"\b(?:{_alternatives(words)})\b", answer.lower())) == {truth}


JUDGES: dict[str, Callable[[object, str], bool]] = {
    "describe": _judge_describe, "place": _judge_place, "where": _judge_where,
    "colour": _judge_one_of(COLOURS), "shape": _judge_one_of(SHAPES), "size": _judge_one_of(SIZES),
    "count": _judge_count, "count_colour": _judge_count, "count_shape": _judge_count,
    "is_thing": _judge_yes_no, "is_shape": _judge_yes_no, "is_colour": _judge_yes_no,
    "relation": _judge_yes_no, "number": _judge_text, "word": _judge_text, "sign": _judge_text,
    "about": lambda _, answer: answer == ABOUT,
}  # fmt: skip


def judge(question: Question, answer: str) -> bool:
    """Whether an answer states the truth and nothing against it; wording is free."""
    return JUDGES[question.kind](question.truth, answer)


def vocabulary() -> list[str]:
    """Every lower-case or capitalised word of the templates and answers, for the tokenizer."""
    text = " ".join(" ".join(ts) for ts in TEMPLATES.values())
    words = set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", text)))
    firsts = {t.split()[0].strip("?.,") for ts in TEMPLATES.values() for t in ts}
    words |= {re.match(r"\w+", w)[0].capitalize() for w in firsts}  # type: ignore[index]
    for group in (COLOURS, SHAPES, SIZES, NUMBERS, RELATIONS, PLACES, ("middle", "centre", ABOUT, BLIND)):
        words |= set(re.findall(r"[a-z]+", " ".join(group)))
    words |= {plural(s) for s in SHAPES} | {"nothing", "there", "no", "yes", "so", "and", "the", "corner",
                                            "a", "an", "is", "number", "word", "text"}  # fmt: skip
    return sorted(words)
