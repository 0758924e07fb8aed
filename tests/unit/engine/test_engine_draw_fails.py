"""A token that cannot be drawn ends its own answer, and nobody else's."""

import pytest
from engine_driver import Backend, Driver, limits, prompt_of

from opsin.core.errors import BadGrammar, DecodeFailed, OpsinError
from opsin.engine import Policy
from opsin.testing import FakeClock


class Sampler:
    """Follows the fake's sampler for some tokens; then the grammar leaves nothing, or a logit is not a number."""

    def __init__(self, sampler, tokens: int, error: OpsinError) -> None:  # type: ignore[no-untyped-def]
        self.sampler, self.tokens, self.error = sampler, tokens, error

    def sample(self, row: int) -> int:
        self.tokens -= 1
        if self.tokens < 0:
            raise self.error
        return int(self.sampler.sample(row))

    def close(self) -> None:
        self.sampler.close()


class Failing(Backend):
    """Requests with a grammar draw three tokens and no more."""

    error: OpsinError = BadGrammar("The grammar allows no token of this model here.")

    def sampler(self, params, seed, compiled=None):  # type: ignore[no-untyped-def]
        made = super().sampler(params, seed, compiled)
        return Sampler(made, 3, self.error) if params.grammar else made


def driver(error: OpsinError | None = None) -> Driver:
    size = limits(n_ctx=2000)
    backend = Failing(lambda _: "x" * 40, limits=size, clock=FakeClock())
    backend.layers = 30
    backend.error = error or backend.error
    return Driver(size, Policy(parallel=4), backend)


@pytest.mark.parametrize("error", [BadGrammar("no token"), DecodeFailed("not a number")])
def test_who_cannot_draw_fails_alone(error: OpsinError) -> None:
    made = driver(error)
    fine, bad, also = made.ask("a"), made.ask("b", grammar="x"), made.ask("c")
    made.run()
    assert isinstance(bad.ends[0], type(error))
    assert bad.text == "xxx"
    assert fine.answer.text == also.answer.text == "x" * 20
    made.close()


def test_between_two_layers_of_an_encode_the_image_is_not_lost() -> None:
    made = driver()
    bad = made.ask("b", grammar="x")
    made.step()
    image = made.ask(prompt_of(1))
    made.run()
    assert made.turns
    assert isinstance(bad.ends[0], BadGrammar)
    assert image.answer.text == "x" * 20
    assert len(made.backend.encoded) == 1
    made.close()
