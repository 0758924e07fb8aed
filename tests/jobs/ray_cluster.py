"""A Ray cluster of several raylets on this machine, without processors of its own on the head."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

# The first one keeps Ray on the loopback address; Ray reads it when it is imported.
os.environ.update(dict.fromkeys(("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED"), "0"))
pytest.importorskip("ray")


def wait_for(condition: Callable[[], Any], seconds: float = 90, what: str = "it", every: float = 0.02) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(every)
    return found


class Raylets:
    def __init__(self, nodes: int, cpus: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from ray.cluster_utils import Cluster

            here: dict[str, Any] = {"object_store_memory": 80 * 2**20}
            head = {"num_cpus": 0, "include_dashboard": False, **here}
            self.cluster = Cluster(initialize_head=True, head_node_args=head)
            self.nodes = [self.cluster.add_node(num_cpus=cpus, **here) for _ in range(nodes)]
            self.address: str = self.cluster.address

    def raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def processes(self, title: str) -> list[tuple[Any, psutil.Process]]:
        """Processes of the cluster with that title, each with its node."""
        found = []
        for node in self.nodes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in self.raylet(node).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        if "".join(process.cmdline()).startswith(title):
                            found.append((node, process))
        return found

    def kill(self, node: Any) -> None:
        """End a node's raylet as a power cut would; its workers end with it."""
        os.kill(self.raylet(node).pid, signal.SIGKILL)

    def close(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.cluster.shutdown()


@contextlib.contextmanager
def raylets(nodes: int, cpus: int) -> Iterator[Raylets]:
    made = Raylets(nodes, cpus)
    try:
        yield made
    finally:
        made.close()
