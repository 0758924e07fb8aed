import dataclasses

import pytest
from prompt_families import image

from opsin.core.errors import BadPrompt
from opsin.prompt import Message


def test_a_bare_text_is_the_only_part():
    assert Message("user", "hi").parts == ("hi",)


def test_parts_keep_their_order():
    content = ["a", image(1), "b"]
    assert Message("user", content).parts == tuple(content)


@pytest.mark.parametrize("role", ["User", "human", "", None, 3])
def test_an_unknown_role_is_refused(role):
    with pytest.raises(BadPrompt, match="system, user, assistant, tool"):
        Message(role, "hi")


@pytest.mark.parametrize("content", [None, 3, b"bytes", [b"bytes"], [{"type": "text", "text": "hi"}], {"a": 1}])
def test_content_of_another_kind_is_refused(content):
    with pytest.raises(BadPrompt, match="texts and images"):
        Message("user", content)


def test_a_message_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Message("user", "hi").role = "system"
