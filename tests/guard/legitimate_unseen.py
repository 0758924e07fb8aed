"""Legitimate repetitive texts written after the guard's constants were chosen: no constant was fitted to them.

The first run over them stopped one kind, the shanty: a line sung three times running had counted as out of order. That
rule was fixed; the texts from `cumulative_tale` on were written after it, and none was stopped at the first run.
"""

from __future__ import annotations

import random

from legitimate_data import CITIES, COLOURS, GOODS, NAMES
from legitimate_text import VERBS
from pieces import words

NOTES = words("C D E F G A B")
MORSE = words(
    ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- ...- .-- -..- -.-- --.."
)


def knitting_pattern(rng: random.Random) -> str:
    rows = []
    for row in range(1, 31):
        a, b = rng.randint(1, 6), rng.randint(1, 6)
        rows.append(f"Row {row}: k{a}, p{b}, k{a}, p{b}, turn.")
    return "\n".join(rows)


def sudoku_boards(rng: random.Random) -> str:
    boards = []
    for number in range(1, 3):
        lines = [" ".join(rng.choice("123456789.") for _ in range(9)) for _ in range(9)]
        boards.append(f"Board {number}\n" + "\n".join(lines))
    return "\n\n".join(boards)


def tic_tac_toe(rng: random.Random) -> str:
    line = "---+---+---"
    games = []
    for move in range(1, 10):
        rows = [" | ".join(rng.choice("XO ") for _ in range(3)) for _ in range(3)]
        games.append(f"Move {move}:\n " + f"\n{line}\n ".join(rows))
    return "\n\n".join(games)


def melody(rng: random.Random) -> str:
    return "\n".join(
        f"Bar {bar}: " + " ".join(rng.choice(NOTES) + rng.choice(["", "4", "5"]) for _ in range(6))
        for bar in range(1, 26)
    )


def morse_code(rng: random.Random) -> str:
    return " / ".join(" ".join(MORSE[ord(char) - 97] for char in good) for good in rng.sample(GOODS, 30))


def assembly(rng: random.Random) -> str:
    return "\n".join(
        f"    {rng.choice(['mov', 'add', 'sub', 'cmp', 'xor'])} {rng.choice(['eax', 'ebx', 'ecx', 'edx'])}, "
        f"{rng.choice(['eax', 'ebx', '[esp+8]', '0x10', '1'])}"
        for _ in range(45)
    )


def test_report(rng: random.Random) -> str:
    return "\n".join(
        f"tests/unit/test_{good}.py::test_{rng.choice(VERBS)} {rng.choice(['PASSED', 'PASSED', 'FAILED'])} "
        f"[{3 * n:3d}%]"
        for n, good in enumerate(rng.sample(GOODS, 26), 1)
    )


def yaml_services(rng: random.Random) -> str:
    return "services:\n" + "\n".join(
        f"  {good}:\n    image: registry/{good}:1.{rng.randint(0, 9)}\n    restart: always\n    ports:\n    "
        f'  - "{rng.randint(1000, 9999)}:80"'
        for good in rng.sample(GOODS, 14)
    )


def unified_diff(rng: random.Random) -> str:
    return "\n".join(
        f"@@ -{n},3 +{n},3 @@\n def {good}():\n-    return {rng.randint(0, 9)}\n+    return {rng.randint(10, 99)}"
        for n, good in zip(range(10, 400, 20), rng.sample(GOODS, 19), strict=False)
    )


def litany(rng: random.Random) -> str:
    return "\n".join(
        f"For the {rng.choice(COLOURS)} {good} and for {name}, we give thanks."
        for good, name in zip(rng.sample(GOODS, 24), NAMES, strict=False)
    )


def shanty(rng: random.Random) -> str:
    return "\n\n".join(
        f"What shall we load on the boat to {city}?\nWhat shall we load on the boat to {city}?\nWhat shall "
        f"we load on the boat to {city},\n"
        f"Early on a {rng.choice(['Monday', 'Friday'])}?\nSome {rng.choice(COLOURS)} {good}, and heave away, heave!"
        for city, good in zip(rng.sample(CITIES, 8), rng.sample(GOODS, 8), strict=True)
    )


def announcements(rng: random.Random) -> str:
    return " ".join(
        f"The train to {city} departs from platform {rng.randint(1, 12)} at "
        f"{rng.randint(5, 22)}:{rng.randint(10, 59)}. Please mind the gap."
        for city in rng.sample(CITIES, 18)
    )


def object_descriptions(rng: random.Random) -> str:
    return " ".join(
        f"The {good} in the image {rng.choice(['is', 'are'])} {rng.choice(COLOURS)}, and next to the "
        f"{good} there is {rng.choice(['a dog', 'a cat', 'nothing'])}."
        for good in rng.sample(GOODS, 18)
    )


def survey_comments(rng: random.Random) -> str:
    moods = ["very happy", "quite happy", "not happy", "rather disappointed", "delighted"]
    return "\n".join(
        f"{name} from {rng.choice(CITIES)}: I was {rng.choice(moods)} with the {rng.choice(GOODS)}." for name in NAMES
    )


def thermometer(rng: random.Random) -> str:
    value, rows = 20.0, []
    for minute in range(0, 300, 5):
        value += rng.uniform(-0.4, 0.5)
        rows.append(f"t={minute:3d} min  T={value:.1f} C  {'#' * int(value)}")
    return "\n".join(rows)


def spanish_menu(rng: random.Random) -> str:
    platos = words(
        "sopa paella tortilla gazpacho croquetas ensalada merluza pulpo jamón queso flan arroz churros calamares pisto"
    )
    return (
        "\n".join(
            f"{n}. {plato.capitalize()} con {rng.choice(platos)} y {rng.choice(platos)}, {rng.randint(5, 25)},50 €"
            for n, plato in enumerate(rng.sample(platos, 15), 1)
        )
        + "\n"
        + "\n".join(
            f"Mesa {n}: {rng.randint(1, 4)} {rng.choice(platos)}, {rng.randint(1, 4)} {rng.choice(platos)}"
            for n in range(1, 16)
        )
    )


def cumulative_tale(rng: random.Random) -> str:
    links = [
        f"the {colour} {good} that {name} would {verb}"
        for colour, good, name, verb in zip(
            rng.choices(COLOURS, k=9), rng.sample(GOODS, 9), rng.sample(NAMES, 9), rng.sample(VERBS, 9), strict=True
        )
    ]
    return "\n\n".join("This is " + ",\nnext to ".join(links[n::-1]) + "." for n in range(9))


def auction(rng: random.Random) -> str:
    bid, lines = 100, []
    for lot, good in enumerate(rng.sample(GOODS, 7), 1):
        lines.append(f"Lot {lot}, the box of {good}.")
        for _ in range(4):
            bid += rng.choice([5, 10, 20])
            lines.append(f"I have {bid}, do I hear {bid + 10}? Going once, going twice.")
        lines.append(f"Sold to {rng.choice(NAMES)}.")
    return "\n".join(lines)


def workout(rng: random.Random) -> str:
    moves = words("squats push-ups lunges sit-ups star-jumps burpees")
    return "\n".join(
        f"Set {n}: {rng.randint(5, 30)} {rng.choice(moves)}, rest {rng.choice([10, 20, 30])} seconds, "
        f"{rng.randint(5, 30)} {rng.choice(moves)}"
        for n in range(1, 26)
    )


def star_ratings(rng: random.Random) -> str:
    return "\n".join(
        f"{good}: {'★' * rng.randint(1, 5)} ({rng.randint(1, 999)} reviews)" for good in rng.sample(GOODS, 33)
    )


def emoji_grid(rng: random.Random) -> str:
    return "\n".join("".join(rng.choice("🟥🟩🟦⬛") for _ in range(18)) for _ in range(24))


def true_or_false(rng: random.Random) -> str:
    return "\n".join(
        f"The {rng.choice(COLOURS)} {good} is {rng.choice(['left', 'right'])} of the {rng.choice(COLOURS)} {other}: "
        f"{rng.choice(['true', 'false'])}"
        for good, other in zip(rng.sample(GOODS, 24), rng.sample(GOODS, 24), strict=True)
    )


def frames_of_a_clip(rng: random.Random) -> str:
    return " ".join(
        f"At {n} seconds, the {rng.choice(['man', 'woman', 'child'])} in the {rng.choice(COLOURS)} coat is "
        f"{rng.choice(['walking', 'standing', 'sitting', 'running'])} {rng.choice(['near', 'behind'])} the "
        f"{rng.choice(['bench', 'tree', 'car', 'fountain'])}."
        for n in range(0, 60, 3)
    )


def paint_by_number(rng: random.Random) -> str:
    return " ".join(
        f"Paint the {rng.choice(['upper', 'lower', 'left', 'right', 'middle'])} part of the {good} "
        f"{rng.choice(COLOURS)}, and let it dry for {rng.randint(5, 90)} minutes."
        for good in rng.sample(GOODS, 18)
    )


def table_of_opposites(rng: random.Random) -> str:
    pairs = "hot cold big small fast slow high low dark light wet dry old new hard soft loud quiet full empty near far"
    flat = words(pairs)
    rows = [
        f"| {a} | {b} | {rng.choice(GOODS)} | {rng.choice(CITIES)} |"
        for a, b in zip(flat[::2], flat[1::2], strict=True)
    ]
    return (
        "| word | opposite | thing | place |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\n"
        + "\n".join(
            f"The opposite of {a} is {b}, and the opposite of {b} is {a}."
            for a, b in zip(flat[::2], flat[1::2], strict=True)
        )
    )
