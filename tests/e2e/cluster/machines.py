"""Virtual machines on this one: each has its own network, files, processes and SSH server.

A machine is a set of Linux namespaces. All machines are connected to one switch, a bridge in its own
namespace, so they can't reach this host's network, and this host can't reach theirs. Besides the system's
folders they share the installed packages, which are the environment of these tests; each machine keeps its
changes to them to itself. The repository is hidden from the machines.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Machine", "Network", "missing", "network"]

NEEDED = ("unshare", "nsenter", "ip", "mount", "sshd", "ssh", "ssh-keygen", "rsync", "git", "curl")
"""Required programs. Most come with Debian's openssh-server, openssh-client, rsync, iproute2, util-linux."""
PREFIX = "10.77.0"
"""Prefix of the addresses. The network exists only between the machines."""

BOOT = r"""
set -e
mount --make-rprivate /
hostname {name}
mkdir -p {disk}/root {disk}/home {disk}/tmp {disk}/run/sshd {disk}/over {disk}/work {disk}/environment
chmod 1777 {disk}/tmp
mount -t overlay overlay -o lowerdir={environment},upperdir={disk}/over,workdir={disk}/work {disk}/environment
mount -t tmpfs tmpfs {repository}
mkdir -p {environment}
mount --bind {disk}/environment {environment}
mount -t tmpfs -o size=3g tmpfs /dev/shm
mkdir -p {disk}/python
mount --bind {python} {disk}/python
mount --bind {disk}/root /root
mount --bind {disk}/home /home
# The interpreter below the environment, where it lies in somebody's home.
if [ ! -e {python}/bin ]; then mkdir -p {python}; mount --bind {disk}/python {python}; fi
printf '127.0.0.1 localhost\n{address} {name}\n' > {disk}/hosts
mount --bind {disk}/hosts /etc/hosts
mount --bind {disk}/run /run
mount --bind {disk}/tmp /tmp
mount -t proc proc /proc
ip link set lo up
while ! ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip address add {address}/24 dev eth0
ip link set eth0 up
# There is no gateway, but programs find their own address by asking for the route to one.
ip route add default via {gateway}
{sshd} -f /run/sshd_config
touch /run/booted
# This shell is the first process of the machine, and adopts the orphans of the others.
while true; do sleep 1; done
"""
SSHD = """
HostKey /run/host_key
PidFile /run/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
AuthorizedKeysFile /root/.ssh/authorized_keys
UsePAM no
MaxSessions 50
MaxStartups 50
Subsystem sftp internal-sftp
"""
PROFILE = """
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# There is no package index in this network; what is installed has to do.
export PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
"""


def missing() -> str:
    """Return what is missing to make these machines; empty if nothing is."""
    if os.geteuid() != 0:
        return "namespaces with networks of their own need root"
    if lost := [name for name in NEEDED if shutil.which(name) is None]:
        return f"{', '.join(lost)} not installed (openssh-server, openssh-client, rsync, iproute2)"
    tried = subprocess.run(["unshare", "-m", "-n", "-p", "-f", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else f"namespaces are not permitted here: {tried.stderr.decode()}"


@dataclass
class Machine:
    """One machine. `boot` starts it; `lose` is a power cut, after which it can boot again with its disk."""

    name: str
    address: str
    disk: Path
    switch: int
    """Id of a process in the switch's network namespace."""
    key: str
    """Public key that may log in to it."""
    repository: Path
    boots: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def home(self) -> Path:
        """Path of its home folder on this host."""
        return self.disk / "root"

    def boot(self) -> None:
        """Start the machine and wait for its SSH server."""
        self._furnish()
        script = BOOT.format(
            name=self.name, disk=self.disk, environment=sys.prefix, python=sys.base_prefix,
            repository=self.repository, address=self.address, gateway=f"{PREFIX}.254",
            sshd=shutil.which("sshd"),
        )  # fmt: skip
        command = ["unshare", "-m", "-n", "-p", "-u", "-i", "--fork", "--kill-child", "bash", "-c", script]
        with (self.disk / "console.log").open("ab") as console:
            self.process = subprocess.Popen(command, stdout=console, stderr=console, stdin=subprocess.DEVNULL)
        self.boots += 1
        inside = self._first()
        plug = f"p{self.address.rpartition('.')[2]}b{self.boots}"
        enter = ["nsenter", "-t", str(self.switch), "-n", "ip", "link"]
        for step in (
            [*enter, "add", plug, "type", "veth", "peer", "name", "eth0", "netns", str(inside)],
            [*enter, "set", plug, "master", "br0", "up"],
        ):
            subprocess.run(step, check=True, capture_output=True)
        booted = self.disk / "run" / "booted"
        _wait(booted.is_file, 30, f"{self.name} did not boot; see {self.disk}/console.log")

    def lose(self) -> None:
        """Kill all its processes at once and disconnect it."""
        if self.process is not None:
            with_init = self._first()
            os.kill(with_init, signal.SIGKILL)
            self.process.wait(10)
            self.process = None
        (self.disk / "run" / "booted").unlink(missing_ok=True)

    def start(
        self, command: str, log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command in a login shell, and write its output to a file on this host."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self._entered(command, environment),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def run(self, command: str, timeout: float = 120, *, check: bool = True) -> str:
        """Run a command in a login shell and return what it printed.

        Raises:
            RuntimeError: with its output, if it fails.
        """
        done = subprocess.run(
            self._entered(command), capture_output=True, text=True, timeout=timeout, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise RuntimeError(f"{self.name}: {command}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}")
        return done.stdout

    def _entered(self, command: str, environment: Mapping[str, str] | None = None) -> list[str]:
        words = {"HOME": "/root", "USER": "root", "TERM": "xterm", "LANG": "C.UTF-8"} | dict(
            environment or {}
        )
        return [
            "nsenter", "-t", str(self._first()), "-m", "-n", "-p", "-u", "-i", "--wd=/root",
            "env", "-i", *(f"{name}={value}" for name, value in words.items()),
            "bash", "-c", f"source ~/.bashrc; {command}",
        ]  # fmt: skip

    def _first(self) -> int:
        """Return the id of its first process on this host."""
        assert self.process is not None, f"{self.name} is off"
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        _wait(lambda: bool(children.read_text().split()), 10, f"{self.name} has no first process")
        return int(children.read_text().split()[0])

    def _furnish(self) -> None:
        """Write the files that a new machine has."""
        ssh = self.home / ".ssh"
        if ssh.is_dir():
            return
        ssh.mkdir(parents=True, mode=0o700)
        (ssh / "authorized_keys").write_text(self.key)
        (self.home / ".bashrc").write_text(PROFILE)
        (self.home / ".profile").write_text(". ~/.bashrc\n")
        # An environment with Python, as a user's machine has. `ray up` installs rayft into it.
        (self.home / "rayft-env").symlink_to(sys.prefix)
        run = self.disk / "run"
        run.mkdir(parents=True)
        (run / "sshd_config").write_text(SSHD)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(run / "host_key")], check=True
        )


@dataclass
class Network:
    """The machines of a test, by name."""

    machines: dict[str, Machine]

    def __getitem__(self, name: str) -> Machine:
        return self.machines[name]


@contextmanager
def network(root: Path, repository: Path, names: tuple[str, ...]) -> Iterator[Network]:
    """Boot machines that can reach each other, and stop them after the block.

    The first may log in to all others: its ~/.ssh/id_ed25519 is the key.

    Args:
        root: folder for their disks.
        repository: the repository's root, which is hidden from all machines.
        names: of the machines, which get the addresses 10.77.0.1, 10.77.0.2, …
    """
    key = root / "id_ed25519"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    switch = subprocess.Popen(["unshare", "-n", "--kill-child", "--fork", "bash", "-c", _SWITCH])
    machines: dict[str, Machine] = {}
    try:
        children = Path(f"/proc/{switch.pid}/task/{switch.pid}/children")
        _wait(lambda: bool(children.read_text().split()), 10, "the switch did not start")
        inside = int(children.read_text().split()[0])
        _wait(lambda: _has_bridge(inside), 10, "the switch has no bridge")
        for number, name in enumerate(names, start=1):
            machines[name] = Machine(
                name,
                f"{PREFIX}.{number}",
                root / name,
                inside,
                key.with_suffix(".pub").read_text(),
                repository,
            )
            machines[name].boot()
        shutil.copy(key, machines[names[0]].home / ".ssh" / "id_ed25519")
        yield Network(machines)
    finally:
        for machine in machines.values():
            machine.lose()
        switch.kill()
        switch.wait()


_SWITCH = "ip link add br0 type bridge; ip link set br0 up; ip link set lo up; exec sleep infinity"


def _has_bridge(inside: int) -> bool:
    command = ["nsenter", "-t", str(inside), "-n", "ip", "link", "show", "br0"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _wait(ready: object, seconds: float, message: str) -> None:
    assert callable(ready)
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(message)
        time.sleep(0.05)


def copy_repository(repository: Path, target: Path) -> None:
    """Copy the files of the repository that are tracked or not ignored, as in a user's checkout."""
    listed = ["git", "-C", str(repository), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, capture_output=True, check=True).stdout
    target.mkdir(parents=True)
    command = [
        "rsync",
        "-a",
        "--ignore-missing-args",
        "--from0",
        "--files-from=-",
        f"{repository}/",
        f"{target}/",
    ]
    subprocess.run(command, input=files, check=True)
