"""Legitimate repetitive texts made of sentences and code. Each function writes one text."""

from __future__ import annotations

import itertools
import random

from legitimate_data import CITIES, COLOURS, GOODS, NAMES, SHAPES
from pieces import words

SIDES = ["above", "below", "left of", "right of", "next to", "behind"]
PLACES = [
    "top left",
    "top centre",
    "top right",
    "middle left",
    "centre",
    "middle right",
    "bottom left",
    "bottom centre",
    "bottom right",
]
VERBS = words("walk sing paint cook dance write build plant read sail climb knit whistle dream wander gather")
COUNTRIES = words(
    "Albania Algeria Andorra Angola Argentina Armenia Australia Austria Bahrain Bangladesh Barbados "
    "Belgium Belize Benin Bhutan Bolivia Botswana Brazil Brunei Bulgaria Burundi Cambodia Cameroon Canada "
    "Chad Chile China Colombia Comoros Croatia Cuba Cyprus Denmark Djibouti Dominica Ecuador Egypt "
    "Eritrea Estonia Ethiopia Fiji Finland France Gabon Gambia Georgia Germany Ghana Greece Grenada "
    "Guatemala Guinea Guyana Haiti Honduras Hungary Iceland India Indonesia Iran Iraq Ireland Israel "
    "Italy Jamaica Japan Jordan Kenya Kuwait Laos Latvia Lebanon Lesotho Liberia Libya Malawi"
)


def captions_in_lines(rng: random.Random) -> str:
    return "\n".join(
        f"A {rng.choice(COLOURS)} {rng.choice(SHAPES)} {rng.choice(SIDES)} a {rng.choice(COLOURS)} "
        f"{rng.choice(SHAPES)}."
        for _ in range(40)
    )


def captions_of_images(rng: random.Random) -> str:
    return "\n".join(
        f"Image {n}: a {rng.choice(COLOURS)} {rng.choice(SHAPES)} on a {rng.choice(COLOURS)} ground."
        for n in range(1, 32)
    )


def described_scene(rng: random.Random) -> str:
    places = rng.sample(PLACES, 9)
    first = " ".join(f"There is a {rng.choice(COLOURS)} {rng.choice(SHAPES)} at the {place}." for place in places)
    relations = " ".join(
        f"The {rng.choice(COLOURS)} {rng.choice(SHAPES)} is {rng.choice(SIDES)} the {rng.choice(COLOURS)} "
        f"{rng.choice(SHAPES)}."
        for _ in range(24)
    )
    return first + " " + relations


def bullets_with_prefix(rng: random.Random) -> str:
    return "\n".join(
        f"- The {rng.choice(COLOURS)} {good} on the {rng.choice(['left', 'right'])} side"
        for good in rng.sample(GOODS, len(GOODS))
    )


def questions_and_answers(rng: random.Random) -> str:
    return "\n".join(
        f"Q: Is there a {rng.choice(COLOURS)} {good} in the image?\nA: {rng.choice(['Yes', 'No'])}."
        for good in rng.sample(GOODS, 20)
    )


def poem_with_refrain(rng: random.Random) -> str:
    stanza = (
        "I went to {city} when the {good} were sweet,\nI met {name} who would {verb} in the street,\n"
        "And all that we carried was {colour} and light,\nSo row, little boat, through the river of night,\n"
        "So row, little boat, row on.\n"
    )
    return "\n".join(
        stanza.format(city=city, good=rng.choice(GOODS), name=name, verb=rng.choice(VERBS), colour=rng.choice(COLOURS))
        for city, name in zip(rng.sample(CITIES, 7), rng.sample(NAMES, 7), strict=True)
    )


def song_with_chorus(rng: random.Random) -> str:
    chorus = (
        "Oh carry me over, carry me home,\nOver the hill where the wild geese roam,\nOh carry me over, carry me home.\n"
    )
    verses = [
        f"{name} had a {rng.choice(GOODS)} cart painted {rng.choice(COLOURS)},\nDrove it to {rng.choice(CITIES)} and "
        f"learned how to {rng.choice(VERBS)},\nNobody asked for the {rng.choice(SHAPES)} on the door.\n"
        for name in rng.sample(NAMES, 6)
    ]
    return "\n".join(verse + "\n" + chorus for verse in verses)


def counting_song(rng: random.Random) -> str:
    numbers = words("twelve eleven ten nine eight seven six five four three two one")
    thing = rng.choice(["lanterns", "barrels", "kites"])
    return "\n".join(
        f"{a.title()} {rng.choice(['tall', 'small'])} {thing} standing on the pier,\n{a.title()} small "
        f"{thing}, and the wind comes near,\n"
        f"One blows over, never mind, my dear,\nNow there are {b} small {thing} on the pier.\n"
        for a, b in itertools.pairwise(numbers)
    )


def growing_song(rng: random.Random) -> str:
    ordinals = words("first second third fourth fifth sixth seventh eighth ninth tenth")
    gifts = [
        f"{name.lower()}'s {good}" for name, good in zip(rng.sample(NAMES, 10), rng.sample(GOODS, 10), strict=True)
    ]
    return "\n".join(
        f"On the {day} night of winter the postman brought for me {', '.join(gifts[n::-1])}."
        for n, day in enumerate(ordinals)
    )


def python_dataclasses(rng: random.Random) -> str:
    return "\n\n".join(
        f"@dataclass\nclass {good.title()}:\n    name: str\n    weight: float\n    {rng.choice(VERBS)}: bool = False\n"
        for good in rng.sample(GOODS, 16)
    )


def python_tests(rng: random.Random) -> str:
    return "\n\n".join(
        f'def test_{verb}_{good}():\n    result = {verb}({rng.randint(1, 99)}, "{good}")\n    assert result '
        f"== {rng.randint(1, 99)}\n"
        for verb, good in zip(VERBS, rng.sample(GOODS, len(VERBS)), strict=True)
    )


def java_getters(rng: random.Random) -> str:
    return "\n".join(
        f"    public String get{good.title()}() {{\n        return this.{good};\n    }}\n\n"
        f"    public void set{good.title()}(String {good}) {{\n        this.{good} = {good};\n    }}\n"
        for good in rng.sample(GOODS, 9)
    )


def c_switch(rng: random.Random) -> str:
    return "switch (code) {\n" + "\n".join(
        f"    case {n}:\n        handle_{good}(state);\n        break;" for n, good in enumerate(rng.sample(GOODS, 22))
    )


def sql_inserts(rng: random.Random) -> str:
    return "\n".join(
        f"INSERT INTO stock (id, name, colour, amount) VALUES ({n}, '{good}', '{rng.choice(COLOURS)}', "
        f"{rng.randint(1, 500)});"
        for n, good in enumerate(rng.sample(GOODS, 16), 1)
    )


def css_rules(rng: random.Random) -> str:
    return "\n".join(
        f".{good} {{\n  color: {rng.choice(COLOURS)};\n  margin: {rng.randint(0, 40)}px;\n"
        f"  padding: {rng.randint(0, 9)}px;\n}}"
        for good in rng.sample(GOODS, 16)
    )


def shell_script(rng: random.Random) -> str:
    return "#!/bin/sh\nset -e\n" + "\n".join(
        f'echo "copying {good}"\ncp -r "/srv/{good}" "/backup/{good}" || exit 1' for good in rng.sample(GOODS, 16)
    )


def latex_table(rng: random.Random) -> str:
    rows = [
        f"{name} & {rng.uniform(0, 1):.3f} & {rng.uniform(0, 1):.3f} & $\\pm {rng.uniform(0, 0.1):.3f}$ \\\\"
        for name in rng.sample(NAMES, 16)
    ]
    return "\\begin{tabular}{lrrr}\n\\hline\n" + "\n".join(rows) + "\n\\hline\n\\end{tabular}"


def latex_sums(rng: random.Random) -> str:
    return "\n".join(
        f"\\sum_{{i=1}}^{{{n}}} i^{rng.randint(1, 4)} = \\frac{{{rng.randint(2, 99)}}}{{{rng.randint(2, 99)}}} \\\\"
        for n in range(2, 22)
    )


def recipe(rng: random.Random) -> str:
    lines = [
        f"{n}. Add {rng.randint(1, 300)} g of {good} and {rng.choice(VERBS)} for {rng.randint(1, 30)} minutes."
        for n, good in enumerate(rng.sample(GOODS, 22), 1)
    ]
    return "Method\n" + "\n".join(lines)


def ascii_art(rng: random.Random) -> str:
    width = rng.randint(20, 26)
    tree = "\n".join(" " * (width - n) + "*" * (2 * n + 1) for n in range(width))
    box = (
        "+"
        + "-" * 38
        + "+\n"
        + "\n".join("|" + f"{good:^38}" + "|" for good in rng.sample(GOODS, 30))
        + "\n+"
        + "-" * 38
        + "+"
    )
    return tree + "\n" + box


def maze(rng: random.Random) -> str:
    return "\n".join("#" + "".join(rng.choice("  #") for _ in range(28)) + "#" for _ in range(26))


def dictionary_entries(rng: random.Random) -> str:
    return "\n".join(
        f"{good} (noun): something {rng.choice(COLOURS)} that people {rng.choice(VERBS)} with in {rng.choice(CITIES)}."
        for good in rng.sample(GOODS, 22)
    )


def genealogy(rng: random.Random) -> str:
    names = [
        f"{first}{second.lower()}" for first, second in zip(rng.sample(NAMES, 36), rng.sample(NAMES, 36), strict=True)
    ]
    return " ".join(
        f"And {a} begat {b}, and lived after {b} {rng.randint(100, 800)} years, and {b} begat {c}."
        for a, b, c in zip(names, names[1:], names[2:], strict=False)
    )


def legal_boilerplate(rng: random.Random) -> str:
    return "\n\n".join(
        f"{n}. The {party} shall not be liable to the {other} for any {good} lost, damaged or delayed, save "
        f"where the loss of the {good} "
        f"results from a breach of this agreement by the {party}, and in no event for more than "
        f"{rng.randint(100, 9000)} euros."
        for n, (party, other, good) in enumerate(
            ((*rng.sample(["Seller", "Buyer", "Carrier", "Agent"], 2), good) for good in rng.sample(GOODS, 9)), 1
        )
    )


def countries(rng: random.Random) -> str:
    chosen = rng.sample(COUNTRIES, len(COUNTRIES))
    return (
        rng.choice([", ", "\n- ", ","]).join(chosen)
        + ". "
        + "The capitals are: "
        + ", ".join(CITIES)
        + ". The people: "
        + ", ".join(NAMES)
        + "."
    )


def countries_and_capitals(rng: random.Random) -> str:
    return (
        "\n".join(
            f"The capital of {country} is {city}."
            for country, city in zip(rng.sample(COUNTRIES, 30), CITIES, strict=True)
        )
        + "\n"
        + "\n".join(
            f"{name} lives in {country}." for name, country in zip(NAMES, rng.sample(COUNTRIES, 36), strict=True)
        )
    )


def repeated_steps(rng: random.Random) -> str:
    return "\n".join(
        f"Step {n}: Click on the {rng.choice(COLOURS)} button, wait {rng.randint(1, 60)} seconds, then "
        f"check that {good} is selected."
        for n, good in enumerate(rng.sample(GOODS, 18), 1)
    )


def form_fields(rng: random.Random) -> str:
    return "\n".join(
        f"{good.title()} name: ____________________  Date: __/__/____  Signature: ____________"
        for good in rng.sample(GOODS, 14)
    )


def menu(rng: random.Random) -> str:
    return "\n".join(
        f"{good.title()} with {rng.choice(GOODS)} and {rng.choice(GOODS)} {'.' * 12} ${rng.randint(4, 30)}.50"
        for good in rng.sample(GOODS, 20)
    )


def dialogue(rng: random.Random) -> str:
    a, b = rng.sample(NAMES, 2)
    return "\n".join(
        f'"Do you have any {good}?" asked {a}.\n"No, I have no {good}," said {b}, "but I can {rng.choice(VERBS)}."'
        for good in rng.sample(GOODS, 15)
    )


def chinese_list(rng: random.Random) -> str:
    return (
        "、".join(
            rng.sample(
                words(
                    "苹果 香蕉 橙子 葡萄 西瓜 草莓 樱桃 桃子 梨子 柠檬 芒果 "
                    "菠萝 石榴 荔枝 龙眼 椰子 木瓜 杏仁 核桃 花生 栗子 红枣"
                ),
                22,
            )
        )
        + "。"
        + "".join(
            f"第{n}张图片里可以看到一个{rng.choice('红黄蓝绿黑白')}色的{thing}。"
            for n, thing in enumerate("猫狗鸟鱼马牛羊兔鸡鸭车船桥树花草山河湖海云雨雪风月星灯门窗桌椅床书笔纸", 1)
        )
    )


def german_sentences(rng: random.Random) -> str:
    return " ".join(
        f"Auf dem {n}. Bild sieht man {rng.choice(['eine Frau', 'einen Mann', 'ein Kind'])} in {city} mit {good}."
        for n, (city, good) in enumerate(zip(CITIES[:24], GOODS, strict=False), 1)
    )


def weather_report(rng: random.Random) -> str:
    return "\n".join(
        f"{city}: {rng.choice(['sunny', 'cloudy', 'rainy', 'windy'])}, high of {rng.randint(5, 35)} "
        f"degrees, low of {rng.randint(-5, 15)} degrees."
        for city in CITIES[:20]
    )


def unit_conversions(rng: random.Random) -> str:
    return "\n".join(f"{n} inches is {n * 2.54:.2f} centimetres." for n in range(rng.randint(1, 9), 45))


def week_plan(rng: random.Random) -> str:
    days = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
    return "\n".join(
        f"Week {week}, {day}: {rng.choice(VERBS)} for {rng.choice([10, 20, 30, 45])} minutes"
        for week in range(1, 5)
        for day in days
    )


def spelled_words(rng: random.Random) -> str:
    return "\n".join(f"{good}: {'-'.join(good)}" for good in rng.sample(GOODS, 30))
