"""Legitimate repetitive texts made of data: tables, records, logs, figures. Each function writes one text."""

from __future__ import annotations

import base64
import json
import random

from pieces import words

CITIES = words(
    "Lisbon Oslo Vienna Prague Dublin Athens Madrid Rome Paris Berlin Warsaw Riga Tallinn Vilnius "
    "Helsinki Stockholm Copenhagen Brussels Amsterdam Bern Zagreb Sofia Bucharest Budapest Belgrade "
    "Skopje Tirana Valletta Nicosia Ankara"
)
NAMES = words(
    "Ada Ben Cleo Dan Eva Finn Gina Hugo Iris Jon Kira Leo Mia Nils Olga Paul Quinn Rosa Sam Tara Udo "
    "Vera Will Xena Yann Zoe Anders Bruna Carlos Dora Emil Fatima Georg Hana Ivan Julia"
)
COLOURS = words("red blue green yellow black white orange purple brown grey")
SHAPES = words("circle square triangle star cross ring heart diamond")
GOODS = words(
    "apples milk bread butter rice eggs cheese coffee tea sugar salt flour pasta tomatoes onions garlic "
    "carrots beans chicken fish soap paper towels candles batteries pens notebooks glue tape string honey "
    "jam oats nuts"
)


def markdown_table(rng: random.Random) -> str:
    rows = [
        f"| {name} | {rng.randint(18, 80)} | {rng.choice(CITIES)} | {rng.choice(['yes', 'no'])} |" for name in NAMES
    ]
    return "| Name | Age | City | Member |\n|------|-----|------|--------|\n" + "\n".join(rows)


def csv_of_numbers(rng: random.Random) -> str:
    rows = [
        f"{day},{rng.uniform(0, 30):.1f},{rng.uniform(0, 100):.0f},{rng.randint(980, 1040)}" for day in range(1, 40)
    ]
    return "day,temperature,humidity,pressure\n" + "\n".join(rows)


def csv_of_categories(rng: random.Random) -> str:
    rows = [f"{n},{rng.choice(COLOURS)},{rng.choice(SHAPES)},{rng.choice(['small', 'large'])}" for n in range(1, 60)]
    return "id,colour,shape,size\n" + "\n".join(rows)


def wide_csv(rng: random.Random) -> str:
    head = ",".join(f"q{n}" for n in range(1, 25))
    return head + "\n" + "\n".join(",".join(rng.choice(["yes", "no", "maybe"]) for _ in range(24)) for _ in range(9))


def json_records(rng: random.Random) -> str:
    records = [
        {"name": name, "age": rng.randint(18, 90), "city": rng.choice(CITIES), "active": rng.random() < 0.5}
        for name in rng.sample(NAMES, 14)
    ]
    return json.dumps(records, indent=2)


def json_boxes(rng: random.Random) -> str:
    boxes = [
        {
            "label": rng.choice(["person", "car", "dog"]),
            "box": sorted(rng.choices(range(640), k=4)),
            "score": round(rng.random(), 2),
        }
        for _ in range(18)
    ]
    return json.dumps({"objects": boxes}, indent=rng.choice([None, 1, 2]))


def json_lines(rng: random.Random) -> str:
    return "\n".join(
        json.dumps(
            {
                "id": n,
                "level": rng.choice(["info", "warn"]),
                "ms": rng.randint(1, 900),
                "path": f"/v1/{rng.choice(GOODS)}",
            }
        )
        for n in range(100, 125)
    )


def json_schema(rng: random.Random) -> str:
    fields = {
        name: {"type": rng.choice(["string", "integer", "boolean"]), "nullable": True} for name in rng.sample(GOODS, 20)
    }
    return json.dumps({"type": "object", "properties": fields, "required": list(fields)[:5]}, indent=2)


def xml_records(rng: random.Random) -> str:
    return "<people>\n" + "\n".join(
        f'  <person id="{n}">\n    <name>{name}</name>\n    <city>{rng.choice(CITIES)}</city>\n  </person>'
        for n, name in enumerate(rng.sample(NAMES, 15), 1)
    )


def html_list(rng: random.Random) -> str:
    return "<ul>\n" + "\n".join(
        f'  <li class="item"><a href="/{good}">{good.title()}</a></li>' for good in rng.sample(GOODS, 22)
    )


def log_lines(rng: random.Random) -> str:
    second = rng.randint(0, 3000)
    lines = []
    for _ in range(24):
        second += rng.randint(1, 40)
        lines.append(
            f"2024-05-01 10:{second // 60 % 60:02d}:{second % 60:02d} INFO worker-{rng.randint(1, 4)} request done in "
            f"{rng.randint(3, 900)} ms"
        )
    return "\n".join(lines)


def directory_listing(rng: random.Random) -> str:
    return "\n".join(
        f"-rw-r--r-- 1 root root {rng.randint(100, 99999):6d} Jan {rng.randint(1, 28):2d} "
        f"10:{rng.randint(0, 59):02d} {good}.txt"
        for good in rng.sample(GOODS, 22)
    )


def number_list(rng: random.Random) -> str:
    start, step = rng.randint(0, 50), rng.randint(1, 9)
    return ", ".join(str(start + step * n) for n in range(130))


def countdown(rng: random.Random) -> str:
    top = rng.randint(90, 200)
    return "\n".join(f"{n}..." for n in range(top, max(0, top - 100), -1)) + "\nLift-off!"


def multiplication_table(rng: random.Random) -> str:
    size = rng.randint(8, 12)
    return "\n".join(f"{a} x {b} = {a * b}" for a in range(1, size + 1) for b in range(1, size + 1))


def multiplication_grid(rng: random.Random) -> str:
    size = rng.randint(12, 15)
    return "\n".join(" | ".join(f"{a * b:3d}" for b in range(1, size + 1)) for a in range(1, size + 1))


def random_digits(rng: random.Random) -> str:
    return "\n".join(" ".join(str(rng.randrange(10)) for _ in range(20)) for _ in range(16))


def bit_matrix(rng: random.Random) -> str:
    return "\n".join(" ".join(str(int(rng.random() < 0.4)) for _ in range(16)) for _ in range(18))


def primes(rng: random.Random) -> str:
    start = rng.randint(2, 500)
    return ", ".join(str(n) for n in range(start, start + 1500) if all(n % d for d in range(2, int(n**0.5) + 1)))


def bounding_boxes(rng: random.Random) -> str:
    return "\n".join(
        f"{rng.choice(['person', 'car', 'tree', 'sign'])}: [{', '.join(str(rng.randint(0, 999)) for _ in range(4))}]"
        for _ in range(26)
    )


def coordinates(rng: random.Random) -> str:
    return "\n".join(f"({rng.uniform(0, 1):.2f}, {rng.uniform(0, 1):.2f})" for _ in range(45))


def receipt(rng: random.Random) -> str:
    lines = [
        f"{rng.randint(1, 4)} x {good:<12} {rng.randint(1, 20)}.{rng.randint(0, 99):02d} EUR"
        for good in rng.sample(GOODS, 30)
    ]
    return "CORNER SHOP\n12 Mill Lane\n\n" + "\n".join(lines) + "\n\nTOTAL 184.20 EUR\nTHANK YOU"


def invoice(rng: random.Random) -> str:
    lines = [
        f"Item {n}: {good}, quantity {rng.randint(1, 9)}, unit price {rng.randint(1, 90)}.00, amount "
        f"{rng.randint(9, 900)}.00"
        for n, good in enumerate(rng.sample(GOODS, 20), 1)
    ]
    return "INVOICE 2031\n" + "\n".join(lines)


def table_of_contents(rng: random.Random) -> str:
    page, lines = 1, []
    for chapter in range(1, 8):
        for section in range(1, 5):
            page += rng.randint(2, 15)
            lines.append(f"{chapter}.{section} {rng.choice(GOODS).title()} and {rng.choice(SHAPES)} {'.' * 30} {page}")
    return "\n".join(lines)


def calendar(rng: random.Random) -> str:
    months = []
    for month in rng.sample(words("January February March April May June July August"), 5):
        offset = rng.randrange(7)
        days = ["  "] * offset + [f"{day:2d}" for day in range(1, 31)]
        weeks = [" ".join(days[i : i + 7]) for i in range(0, len(days), 7)]
        months.append(f"{month}\nMo Tu We Th Fr Sa Su\n" + "\n".join(weeks))
    return "\n\n".join(months)


def timetable(rng: random.Random) -> str:
    lines = [
        f"{hour:02d}:{rng.randint(0, 29):02d}  {rng.choice(CITIES)}  platform {rng.randint(1, 9)}  on time"
        for hour in range(5, 23)
    ]
    return (
        "Departures\n"
        + "\n".join(lines)
        + "\n"
        + "\n".join(f"{h:02d}:30  {rng.choice(CITIES)}  delayed" for h in range(5, 23))
    )


def chess_moves(rng: random.Random) -> str:
    def move() -> str:
        return rng.choice(words("  N B R Q K")) + rng.choice("abcdefgh") + str(rng.randint(1, 8))

    return " ".join(f"{n}. {move()} {move()}" for n in range(1, 50))


def base64_text(rng: random.Random) -> str:
    return base64.b64encode(rng.randbytes(700)).decode()


def hex_dump(rng: random.Random) -> str:
    return "\n".join(f"{16 * n:08x}  " + " ".join(f"{rng.randrange(256):02x}" for _ in range(16)) for n in range(14))


def dna(rng: random.Random) -> str:
    return "\n".join("".join(rng.choices("ACGT", k=60)) for _ in range(25))


def answer_key(rng: random.Random) -> str:
    return "\n".join(f"{n}. {rng.choice('ABCD')}" for n in range(1, 80))


def yes_no_answers(rng: random.Random) -> str:
    return "\n".join(f"{n}. {rng.choice(['Yes', 'No'])}" for n in range(1, 80))


def phone_book(rng: random.Random) -> str:
    return "\n".join(f"{name} {rng.choice('ABCDEFGH')}. — 555-{rng.randint(0, 9999):04d}" for name in NAMES)


def colour_grid(rng: random.Random) -> str:
    return "\n".join(f"Row {r}: " + ", ".join(rng.choice(COLOURS[:6]) for _ in range(8)) for r in range(1, 16))


def confusion_matrix(rng: random.Random) -> str:
    names = COLOURS + SHAPES[:2]
    head = "          " + " ".join(f"{name:>8}" for name in names)
    return (
        head + "\n" + "\n".join(f"{name:<10}" + " ".join(f"{rng.randint(0, 99):8d}" for _ in names) for name in names)
    )


def checklist(rng: random.Random) -> str:
    return "\n".join(f"- [{rng.choice('x ')}] buy {rng.randint(2, 9)} {good}" for good in rng.sample(GOODS, len(GOODS)))


def sports_results(rng: random.Random) -> str:
    return "\n".join(
        f"{a} {rng.randint(0, 5)} - {rng.randint(0, 5)} {b}" for a in CITIES[:7] for b in CITIES[:6] if a != b
    )
