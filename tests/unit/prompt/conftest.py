"""Templates written for these tests need no trial, which takes a fifth of a second each; its own tests have it."""

import pytest


@pytest.fixture(autouse=True)
def _trusted_templates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.module.__name__ != "test_prompt_trial":
        monkeypatch.setattr("opsin.prompt.builder.check_template", lambda *_args, **_options: None)
