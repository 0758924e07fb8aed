"""How sure of each value: found by its JSON pointer, whatever the document and however it is cut into tokens."""

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsin.core.answer import TokenLogprob
from opsin.core.confidence import confidence_of
from opsin.core.request import SamplingParams

DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def pointers(value: Any, pointer: str = "") -> set[str]:
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        names = ((str(name).replace("~", "~0").replace("/", "~1"), one) for name, one in items)
        return {found for name, one in names for found in pointers(one, f"{pointer}/{name}")}
    return {pointer}


@given(DOCUMENTS, st.booleans(), st.integers(0, 99))
def test_every_value_has_one(document: Any, escaped: bool, seed: int) -> None:
    data = json.dumps(document, ensure_ascii=escaped, indent=seed % 3 or None).encode()
    draw, at, tokens = random.Random(seed), 0, []
    while at < len(data):
        stop = at + draw.randint(1, 5)
        tokens.append(TokenLogprob(0, data[at:stop], -1.0, permitted=-0.1))
        at = stop
    found = confidence_of(data.decode(), tokens)
    assert found.keys() == pointers(document)
    for one in found.values():
        assert 0 < one.probability <= math.exp(-0.1) + 1e-9
        assert not one.changed


def test_a_value_has_the_product_of_its_tokens_and_no_others() -> None:
    parts = [
        (" ", 9.0),
        ('{"', 9.0),
        ('paid":', 9.0),
        (" t", 0.5),
        ("rue", 0.25),
        (', "n": ', 9.0),
        ('"é', 1.0),
        ('"}', 0.125),
    ]
    tokens = [TokenLogprob(0, text.encode(), 0.0, permitted=-cost, overruled=text == "rue") for text, cost in parts]
    found = confidence_of("".join(text for text, _ in parts).strip(), tokens)
    assert found["/paid"].probability == pytest.approx(math.exp(-0.75))
    assert found["/n"].probability == pytest.approx(math.exp(-1.125))
    assert (found["/paid"].changed, found["/n"].changed) == (True, False)


def test_half_a_document_has_none() -> None:
    assert confidence_of('{"a": "x', [TokenLogprob(0, b'{"a": "x', 0.0)]) == {}
    assert confidence_of("", []) == {}


def test_it_needs_a_schema() -> None:
    with pytest.raises(ValueError, match="give a schema"):
        SamplingParams(confidence=True)
