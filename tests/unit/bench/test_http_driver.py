"""The HTTP driver against small servers that answer as OpenAI's do, and as broken ones do."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from typer.testing import CliRunner

from opsin.bench import workloads
from opsin.bench.drivers import HttpDriver
from opsin.bench.report import Target, as_text, ratios
from opsin.bench.workloads import Ask, RequestFailed, Workload, measure_in_turn, run_workload
from opsin.cli.bench import app
from opsin.core.answer import Usage
from opsin.core.errors import BadParameter

pytestmark = pytest.mark.slow

WORKLOAD = Workload("W1", "two images", (Ask(0, max_tokens=3), Ask(1, max_tokens=3)))
Script = Callable[[dict[str, Any]], list[Any]]


@pytest.fixture(autouse=True)
def _small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "IMAGE_SIZE", (32, 24))


def chunk(text: str = "", **more: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}], **more}


def good(body: dict[str, Any]) -> list[Any]:
    usage = {
        "prompt_tokens": 20,
        "completion_tokens": body["max_tokens"],
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    thought = {"choices": [{"delta": {"role": "assistant", "reasoning_content": "hm"}}]}
    return [thought, *[chunk("a")] * (body["max_tokens"] - 1), {"choices": [], "usage": usage}]


def only_short(body: dict[str, Any]) -> list[Any]:
    return good(body) if body["max_tokens"] < 32 else [500]


class Stub:
    """A server that answers with the events of `script`; an int is a status with OpenAI's error body."""

    def __init__(self, script: Script) -> None:
        bodies: list[dict[str, Any]] = []
        keys: list[str | None] = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                return

            def do_GET(self) -> None:
                self._whole(200, {"data": [{"id": "stub-model"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                bodies.append(body)
                keys.append(self.headers["Authorization"])
                events = script(body)
                if isinstance(events[0], int):
                    self._whole(events[0], {"error": {"message": "the queue is full"}})
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                self.wfile.write(b": waiting\n\n")
                for event in events:
                    self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                self.wfile.write(b"data: [DONE]\n\n")

            def _whole(self, status: int, document: dict[str, Any]) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())

        self.bodies, self.keys = bodies, keys
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Stub]]:
    stubs: list[Stub] = []

    def start(script: Script = good) -> Stub:
        stubs.append(Stub(script))
        return stubs[-1]

    yield start
    for stub in stubs:
        stub.close()


def test_a_question_goes_out_as_an_image_and_a_text_and_every_piece_is_stamped(
    serve: Callable[[Script], Stub],
) -> None:
    stub = serve(good)
    driver = HttpDriver(stub.url + "/v1/", api_key="secret")
    assert driver.model == "stub-model"
    (first, _) = timings = run_workload(driver, WORKLOAD, [b"one", b"two"])
    assert [len(timing.pieces) for timing in timings] == [3, 3]
    assert first.sent < first.pieces[0] <= first.pieces[2] <= first.ended
    assert first.usage == Usage(prompt_tokens=20, completion_tokens=3, cached_tokens=4)
    assert stub.keys == ["Bearer secret"] * 2
    image, text = stub.bodies[0]["messages"][0]["content"]
    assert image == {"type": "image_url", "image_url": {"url": "data:image/png;base64,b25l"}}
    assert text == {"type": "text", "text": "what is this?"}
    sent = {name: stub.bodies[0][name] for name in ("temperature", "max_tokens", "ignore_eos", "guard", "stream")}
    assert sent == {"temperature": 0, "max_tokens": 3, "ignore_eos": True, "guard": False, "stream": True}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (lambda _: [503], "2 of 2 questions failed: status 503: the queue is full"),
        (lambda _: [chunk("a"), {"error": {"message": "out of memory"}}], "out of memory"),
        (lambda _: [chunk("a")], "did not say how many tokens"),
        (lambda _: [chunk("a"), {"usage": {"completion_tokens": 2}}], "an answer has 2 tokens instead of 3"),
    ],
)
def test_failed_and_unequal_answers_make_a_servers_runs_invalid_and_not_the_others(
    serve: Callable[[Script], Stub], script: Script, reason: str
) -> None:
    drivers = {"well": HttpDriver(serve(good).url), "ill": HttpDriver(serve(script).url)}
    told: list[str] = []
    found = measure_in_turn(drivers, WORKLOAD, runs=3, tell=told.append)
    assert found["well"].invalid is None
    assert len(found["well"].runs) == 3
    assert reason in (found["ill"].invalid or "")
    assert found["ill"].failed == (0 if "has 2 tokens" in reason else 2)
    assert told == [
        "W1, run 1 of 3 on well",
        "W1, run 1 of 3 on ill",
        "W1, run 2 of 3 on well",
        "W1, run 3 of 3 on well",
    ]
    targets = [Target(name, {}, (result,)) for name, result in found.items()]
    assert set(ratios(targets)["ill"]["W1"].values()) == {None}
    assert "invalid" in as_text(targets)


def test_every_second_run_goes_backwards_with_equal_images(serve: Callable[[Script], Stub]) -> None:
    stubs = {"a": serve(good), "b": serve(good)}
    told: list[str] = []
    measure_in_turn({n: HttpDriver(s.url) for n, s in stubs.items()}, WORKLOAD, runs=2, tell=told.append)
    assert [line[-1] for line in told] == ["a", "b", "b", "a"]
    assert stubs["a"].bodies == stubs["b"].bodies


def test_a_server_that_hangs_up_is_a_failed_question() -> None:
    stub = Stub(good)
    driver = HttpDriver(stub.url)
    stub.close()
    with pytest.raises(RequestFailed, match="broke off"):
        next(driver(b"\x89PNG", "?", 1))
    assert run_workload(driver, WORKLOAD, [b"", b""])[0].failed is not None


def test_what_is_no_server_is_a_bad_parameter(serve: Callable[[Script], Stub]) -> None:
    with pytest.raises(BadParameter, match="must begin with http"):
        HttpDriver("localhost:1")
    closed = serve(good)
    closed.close()
    with pytest.raises(BadParameter, match="No server answers"):
        HttpDriver(closed.url)


def test_the_command_measures_two_servers_and_ends_with_one_when_one_fails(serve: Callable[[Script], Stub]) -> None:
    def ask(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["http", *arguments, "--workloads", "W1", "--runs", "1"])
        return result.exit_code, result.stdout

    code, out = ask(f"one={serve(good).url}", f"two={serve(good).url}")
    document = json.loads(out.splitlines()[-1])
    assert code == 0
    assert document["servers"]["one"]["workloads"]["W1"]["completion_tokens"] == [32] * 4
    assert document["servers"]["two"]["model"] == "stub-model"
    assert document["ratios"]["two"]["W1"]["total_s"] > 0
    code, out = ask(serve(good).url, f"ill={serve(only_short).url}")
    assert code == 1
    assert json.loads(out.splitlines()[-1])["servers"]["ill"]["workloads"]["W1"]["failed"] == 4
