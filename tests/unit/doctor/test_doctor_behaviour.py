"""Each finding about an engine's behaviour, on an engine that behaves so, and on one that does not."""

from collections.abc import Callable

from opsin.cache import EmbeddingCache
from opsin.core.backend import BackendLimits
from opsin.doctor.check import Check
from opsin.doctor.examine import MAX_TOKENS, behaviour_checks
from opsin.engine import Engine
from opsin.prompt import PromptBuilder, TemplateSource
from opsin.testing import FakeBackend
from opsin.testing.fake_backend import N_VOCAB, TURN_TEXT

TEMPLATE = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}" + TURN_TEXT
LIMITS = BackendLimits(n_ctx=2048, n_ubatch=64, n_seq_max=8, n_vocab=N_VOCAB, n_embd=4, n_ctx_seq=2048)


def by_image(prompt: str) -> str:
    """An answer that begins with something of the image."""
    identity = prompt.partition("<")[2]
    return f"{identity[:8]}: a square."


def found(reply: Callable[[str], str]) -> dict[str, Check]:
    backend = FakeBackend(reply, limits=LIMITS)
    prompts = PromptBuilder(TemplateSource(TEMPLATE, "llama", "fake", None, "", "", frozenset({TURN_TEXT})))
    with Engine(lambda: backend, images=EmbeddingCache(2**20), now=backend.clock) as engine:
        checks = behaviour_checks(engine, prompts)
    assert all(check.message.endswith(".") and "\n" not in check.message for check in checks)
    return {check.name: check for check in checks}


def test_all_is_well_with_an_engine_that_behaves() -> None:
    checks = found(by_image)
    assert {name: check.status for name, check in checks.items()} == {"behaviour.sees": "ok", "behaviour.ends": "ok"}


def test_a_model_that_does_not_see_its_images_is_found() -> None:
    check = found(lambda _: "a square.")["behaviour.sees"]
    assert check.status == "fail"
    assert "does not see" in check.message


def test_an_answer_that_is_long_is_told() -> None:
    words = " ".join(f"{word}{word * 7 % 91}" for word in range(400))
    check = found(lambda _: words)["behaviour.ends"]
    assert check.status == "warn"
    assert "--max-tokens" in check.message
    assert check.evidence["max_tokens"] == MAX_TOKENS
    assert check.evidence["text"] in words


def test_a_template_whose_end_is_no_end_token_is_found() -> None:
    check = found(lambda _: "a square.</s>USER: and then? ASSISTANT: more. " + "and on " * 40)["behaviour.ends"]
    assert check.status == "fail"
    assert "another turn" in check.message
    assert "template" in check.message


def test_an_answer_that_goes_round_in_circles_is_found() -> None:
    check = found(lambda _: "it is " + "no " * 2000)["behaviour.ends"]
    assert check.status == "fail"
    assert "repeat themselves" in check.message
