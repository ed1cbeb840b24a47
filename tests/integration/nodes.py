"""A Ray cluster of two nodes on this machine whose disks are not shared.

The second node has a mount namespace of its own, in which some folders are empty.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.processes import eventually, process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))


@dataclass(frozen=True)
class Nodes:
    """A head without CPUs, and a node with one, which does not see some folders of the head."""

    root: Path
    port: int
    node: psutil.Process

    def there(self, path: Path) -> Path:
        """Return where this process finds what the node has at a path."""
        return Path(f"/proc/{self.node.pid}/root") / path.relative_to("/")


@contextmanager
def two_nodes(hidden: Sequence[str]) -> Iterator[Nodes]:
    """Start a cluster; skip the test where no mount namespace can be made.

    Args:
        hidden: names of the folders below `root` of which each node has one of its own.
    """
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:
        pytest.skip("a mount namespace can't be made here: it takes root")
    # Short, since Ray's sockets are below it.
    root = Path(tempfile.mkdtemp(prefix="rn"))
    ray, port = str(Path(sys.executable).parent / "ray"), free_port()
    options = [
        "--block", "--disable-usage-stats", "--object-store-memory=100000000",
        "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    for name in hidden:
        (root / name).mkdir()
    head = [
        ray, "start", "--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false",
        f"--temp-dir={root}/r", *options,
    ]  # fmt: skip
    mounts = [f"mount -t tmpfs none {root}/{name}" for name in hidden]
    join = [ray, "start", f"--address=127.0.0.1:{port}", "--num-cpus=1", *options]
    node = ["unshare", "-m", "sh", "-c", " && ".join([*mounts, "exec " + " ".join(join)])]
    try:
        with process(head, root / "head.log"), process(node, root / "node.log") as joined:
            eventually(
                lambda: "Ray runtime started" in (root / "node.log").read_text(), "the node did not start"
            )
            yield Nodes(root, port, joined)
    finally:
        shutil.rmtree(root, ignore_errors=True)
