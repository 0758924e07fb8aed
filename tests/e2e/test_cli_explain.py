"""`opsin explain` as a user types it, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

LOGS = Path(__file__).parents[1] / "logs"
FOUNDING = LOGS / "lcp-0.2.56-founding.log"


def run(*arguments: object, stdin: bytes | None = None, code: int = 0) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "opsin", "explain", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return done


def test_the_founding_log_is_explained_to_people() -> None:
    shown = run(FOUNDING).stdout.decode()
    assert "3,438 tokens were generated until the context of 4,096 was full" in shown
    assert "Vision took at most 0.94 s" in shown
    assert "24.2 s were spent between tokens" in shown
    assert "about 2.6 s" in shown
    assert shown.index("1. runaway") < shown.index("2. between_tokens")


def test_json_and_standard_input() -> None:
    found = json.loads(run("-", "--json", stdin=FOUNDING.read_bytes()).stdout)
    assert found["causes"][0]["name"] == "runaway"
    assert found["healthy"] is False
    assert json.loads(run(LOGS / "llava-cli-m2-healthy.log", "--json").stdout)["healthy"] is True


def test_what_opsin_ask_prints_is_read() -> None:
    assert b"Opsin: Healthy" in run(LOGS / "opsin-ask.log").stdout


def test_unknown_and_unreadable_logs_give_one_sentence_and_two(tmp_path: Path) -> None:
    for log in (LOGS / "unknown-nginx.log", tmp_path / "none.log", tmp_path):
        done = run(log, code=2)
        assert done.stdout == b""
        assert done.stderr.startswith(b"opsin: ")
        assert done.stderr.count(b"\n") == 1
    assert run("-", stdin=b"", code=2).stderr.count(b"\n") == 1


def test_control_sequences_of_a_log_do_not_reach_the_terminal() -> None:
    hostile = b'disabling multimodal projector offload" reason=x\x1b]0;owned\x07\n' + FOUNDING.read_bytes()
    assert b"\x1b" not in run("-", stdin=hostile).stdout
