"""`opsin serve --ray`: two replicas of the demo model on a cluster of two raylets."""

import base64
import io
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw
from ray_cluster import Raylets, raylets, wait_for

from opsin.server.ray_serve import session_of

pytestmark = pytest.mark.jobs

KEY = "a-key-of-the-test"
REPLICA = "ray::ServeReplica:opsin:Replica"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with raylets(nodes=2, cpus=2) as made:
        yield made


@pytest.fixture(scope="module")
def client(cluster: Raylets) -> Iterator[httpx.Client]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "opsin", "serve", "--ray", cluster.address, "--replicas", "2", "--port", str(port)]
    command += ["--cpus-per-worker", "1", "--no-disk-cache"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OPSIN_API_KEY": KEY})
    headers = {"Authorization": f"Bearer {KEY}"}
    try:
        assert server.stderr is not None
        assert any(b"ready at" in line for line in iter(server.stderr.readline, b""))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
            yield client
    finally:
        server.terminate()
        _, told = server.communicate(timeout=60)
        assert b"Traceback" not in told
        assert server.returncode == 0, told.decode()


def scene(number: int) -> str:
    place, file = random.Random(number), io.BytesIO()
    image = Image.new("RGB", (112, 112), (230, 230, 225))
    x, y, r = place.randint(30, 80), place.randint(30, 80), place.randint(14, 28)
    ImageDraw.Draw(image).ellipse((x - r, y - r, x + r, y + r), ("red", "green", "blue")[number % 3])
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def body(number: int, question: str, **more: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": scene(number)}}]
    return {"messages": [{"role": "user", "content": parts}], "max_tokens": 16, "temperature": 0, **more}


def ask(client: httpx.Client, number: int, question: str) -> dict[str, Any]:
    """An answer; those that a replica took with it are asked again."""

    def asked() -> dict[str, Any] | None:
        response = client.post("/v1/chat/completions", json=body(number, question))
        assert response.status_code in {200, 500, 503}, response.text
        return response.json() if response.status_code == 200 else None

    found: dict[str, Any] = wait_for(asked, what="an answer")
    return found


def remembered(answer: dict[str, Any]) -> bool:
    return answer["stages"]["encode_ms"] == 0


def test_an_image_has_one_name_wherever_it_stands_in_a_request() -> None:
    url = scene(1)
    chat = json.dumps(body(1, 'a "url": "x" in the question')).encode()
    responses = json.dumps({"input": [{"content": [{"type": "input_image", "image_url": url}]}]}, indent=1).encode()
    assert session_of(chat) == session_of(responses) != ""
    assert session_of(json.dumps(body(2, "?")).encode()) != session_of(chat)
    assert session_of(b'{"messages": [{"role": "user", "content": "no image"}]}') == ""


def test_a_key_is_needed_and_errors_are_those_of_the_server(client: httpx.Client) -> None:
    assert client.post("/v1/chat/completions", json=body(1, "?"), headers={"Authorization": "Bearer no"}).json()[
        "error"
    ]["type"] == ("authentication_error")
    wrong = client.post("/v1/chat/completions", json={"messages": 3})
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request_error")
    assert client.get("/v1/models").json()["data"][0]["id"]


def test_answers_are_streamed(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/chat/completions", json=body(50, "What is this?", stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        reads = list(response.iter_raw())
    events = [line[6:] for line in b"".join(reads).decode().splitlines() if line.startswith("data: ")]
    assert len(reads) > 1
    assert events[-1] == "[DONE]"
    said = "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-2])
    whole = client.post("/v1/chat/completions", json=body(50, "What is this?")).json()
    assert said == whole["choices"][0]["message"]["content"]


def test_an_image_goes_to_the_replica_that_remembers_it_and_a_killed_one_is_replaced(
    client: httpx.Client, cluster: Raylets
) -> None:
    numbers = range(100, 112)
    assert not any(remembered(ask(client, number, "What is this?")) for number in numbers)
    # A replica that says for too long nothing of how busy it is gets no request: on a busy machine that may happen.
    assert sum(remembered(ask(client, number, "What colour is it?")) for number in numbers) >= len(numbers) - 1
    [(_, one), _] = cluster.processes(REPLICA)
    one.kill()
    still = [remembered(ask(client, number, "Where is it?")) for number in numbers]
    assert 0 < sum(still) < len(numbers)
    wait_for(
        lambda: len({process.pid for _, process in cluster.processes(REPLICA)} - {one.pid}) == 2, what="another replica"
    )
    assert all(ask(client, number, "What is this?")["choices"] for number in numbers)
