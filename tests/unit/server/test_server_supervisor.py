"""The parent with real child processes, which are a few lines each: falls, back-off, ends, and pictures that kill."""

import json
import logging
import signal
import socket
import sys
from pathlib import Path

import pytest

from opsin.core.errors import BadParameter
from opsin.server.ledger import Account
from opsin.server.supervisor import MOST_STARTS, Supervisor, address_of, bind, describe

pytestmark = pytest.mark.slow

# Each child knows the how-manieth it is, speaks on its line, and may send its parent a signal.
PRELUDE = """
import json, os, signal, socket, sys
from pathlib import Path
line = socket.socket(fileno=int(sys.argv[2]))
folder = Path({folder!r})
number = len(list(folder.glob("hello-*")))
read = b""
while not read.endswith(b"\\n"):
    read += line.recv(65536)
(folder / f"hello-{{number}}").write_bytes(read)
def tell(text):
    line.sendall(text.encode())
def stop_parent(which=signal.SIGTERM):
    os.kill(os.getppid(), which)
def wait_for_term(end=lambda *_: os._exit(0)):
    signal.signal(signal.SIGTERM, end)
    return lambda: [signal.pause() for _ in iter(int, 1)]
"""
STOP = "pause = wait_for_term(); tell('r\\n'); stop_parent(); pause()"


def run(
    folder: Path, code: str, sleep_first: float = 0.001, healthy_seconds: float = 60.0
) -> tuple[int, list[dict[str, object]]]:
    """The exit code, and what each child was greeted with."""
    command = [sys.executable, "-S", "-c", PRELUDE.format(folder=str(folder)) + code]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        hello = {"settings": {"port": 1}}
        supervisor = Supervisor(command, listener, hello, 1.0, sleep_first=sleep_first, healthy_seconds=healthy_seconds)
        code_of = supervisor.run()
    return code_of, [json.loads(path.read_text()) for path in sorted(folder.glob("hello-*"))]


def test_a_child_that_aborts_is_started_again_and_the_log_names_the_cause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code, hellos = run(tmp_path, f"if number == 0: tell('r\\n'); os.abort()\n{STOP}")
    assert code == 0
    assert hellos == [{"settings": {"port": 1}, "blocked": []}] * 2
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(lines) == 1
    assert "SIGABRT" in lines[0]


def test_a_picture_in_flight_at_two_deaths_is_handed_to_later_children(tmp_path: Path) -> None:
    work = "tell('+bad\\n+bad\\n-bad\\n+well\\n-well\\nr\\n')"
    code, hellos = run(tmp_path, f"if number < 2:\n    {work}\n    os.abort()\n{STOP}")
    assert code == 0
    assert [hello["blocked"] for hello in hellos] == [[], [], ["bad"]]


def test_what_is_in_flight_when_it_is_told_to_end_is_no_death(tmp_path: Path) -> None:
    code, hellos = run(tmp_path, f"tell('+a\\n'); {STOP}")
    assert code == 0
    assert len(hellos) == 1


@pytest.mark.parametrize("hopeless", [2, 3])
def test_a_model_or_setting_that_cannot_be_used_is_not_tried_again(tmp_path: Path, hopeless: int) -> None:
    code, hellos = run(tmp_path, f"os._exit({hopeless})")
    assert (code, len(hellos)) == (hopeless, 1)


def test_one_that_never_gets_ready_is_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    code, hellos = run(tmp_path, "os.abort()")
    assert (code, len(hellos)) == (4, MOST_STARTS)
    assert waits(caplog) == [0.001, 0.002, 0.004, 0.008]
    assert f"{MOST_STARTS} times in a row" in caplog.records[-1].getMessage()


def waits(caplog: pytest.LogCaptureFixture) -> list[float]:
    lines = [record.getMessage() for record in caplog.records]
    return [float(line.rpartition(" in ")[2].removesuffix(" s")) for line in lines if "started again" in line]


def test_the_delay_doubles_and_begins_anew_after_health(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only the fourth child lives long enough to count as healthy, so the delay behind it is the first one again."""
    code = "if number == 3: tell('r\\n'); import time; time.sleep(1)\nif number < 5: tell('r\\n'); os._exit(1)\n"
    assert run(tmp_path, code + STOP, healthy_seconds=0.9, sleep_first=0.004)[0] == 0
    assert waits(caplog) == [0.004, 0.008, 0.016, 0.004, 0.008]


def test_a_second_signal_does_not_wait(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deaf = "pause = wait_for_term(lambda *_: stop_parent(signal.SIGINT)); tell('r\\n'); stop_parent(); pause()"
    code, _ = run(tmp_path, deaf)
    assert code == 4
    assert "SIGKILL" in caplog.text


def test_ctrl_c_ends_in_good_order_with_its_own_code(tmp_path: Path) -> None:
    code, hellos = run(tmp_path, STOP.replace("stop_parent()", "stop_parent(signal.SIGINT)"))
    assert (code, len(hellos)) == (130, 1)


def test_the_signals_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)]
    run(tmp_path, "os._exit(3)")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)] == before


def test_lines_may_be_cut_anywhere_and_a_picture_may_be_asked_about_twice() -> None:
    account = Account()
    for death in (1, 2):
        for byte in b"+aa\n+aa\n-aa\n+b\n-b\nr\n+c":
            account.read(bytes([byte]))
        assert account.ready
        account.close(died=True)
        assert account.blocked == (["aa"] if death == 2 else [])
        assert not account.ready
    account.read(b"+d\n")
    account.close(died=False)
    account.read(b"+d\n")
    account.close(died=True)
    assert account.blocked == ["aa"]


def test_a_port_in_use_and_an_address_elsewhere_are_one_sentence() -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert address_of(taken) == f"127.0.0.1:{port}"
        with pytest.raises(BadParameter, match=f"Port {port} of 127.0.0.1 is in use"):
            bind("127.0.0.1", port)
    with pytest.raises(BadParameter, match=r"203\.0\.113\.1 is no address of this machine"):
        bind("203.0.113.1", 0)
    with pytest.raises(BadParameter, match="no address of this machine"):
        bind("x" * 64, 0)
    with bind("0.0.0.0", 0) as everywhere:
        assert address_of(everywhere).startswith("127.0.0.1:")


def test_ends_are_told_in_words() -> None:
    assert describe(-signal.SIGSEGV) == "SIGSEGV"
    assert "memory" in describe(-signal.SIGKILL)
    assert describe(4) == "exit code 4"
