"""Nodes on one machine: namespaces on a switch, each with a host name, an address, a cable (eth0) and its own sshd.

They share the file system and the process table, as nodes share a disk; what crosses between them crosses a network.
Everything has this process's number in its name, and only that is removed in the end.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

_PROGRAMS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}  # Debian's packages
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_PRIVILEGES = Path("/run/sshd")  # sshd wants it


def missing() -> str | None:
    """Why there can be no nodes here."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    packages = [package for program, package in _PROGRAMS.items() if not shutil.which(program, path=_PATH)]
    if packages:
        return f"missing: {', '.join(packages)}; sudo bash tests/multinode/install.sh"
    tried = subprocess.run(["ip", "netns", "exec", "no-such-namespace", "true"], capture_output=True, text=True)
    return None if "No such file" in tried.stderr else f"no network namespaces here: {tried.stderr.strip()}"


@dataclass
class Node:
    """One of them."""

    name: str  # of its network namespace, and its host name
    address: str
    folder: Path  # of its sshd's files
    home: Path  # HOME of what is started on it over ssh
    sshd: subprocess.Popen | None = None

    def __str__(self) -> str:
        """As a run names it."""
        return f"{self.name} ({self.address})"

    def inside(self, *command: object) -> list[str]:
        """A command as it is run on the node."""
        return ["ip", "netns", "exec", self.name, "nsenter", f"--uts={self.host_name}", *map(str, command)]

    @property
    def host_name(self) -> Path:
        """Where the namespace of its host name is held."""
        return self.folder / "uts"

    def christen(self) -> None:
        """Gives it its host name."""
        self.host_name.touch()
        _run("unshare", f"--uts={self.host_name}", "hostname", self.name)

    def start_sshd(self, key: Path) -> None:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "host_key"], check=True)
        (self.folder / "config").write_text(
            f"ListenAddress {self.address}\nHostKey {self.folder}/host_key\nAuthorizedKeysFile {key}.pub\n"
            f"PidFile {self.folder}/pid\nStrictModes no\nPermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\n"
            f"SetEnv HOME={self.home}\n"
        )
        log = (self.folder / "log").open("w")
        command = self.inside(shutil.which("sshd", path=_PATH), "-D", "-e", "-f", self.folder / "config")
        self.sshd = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def processes(self) -> list[psutil.Process]:
        """All that run on it."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout
        processes = []
        for pid in found.split():
            with suppress(psutil.NoSuchProcess):
                processes.append(psutil.Process(int(pid)))
        return processes

    def kill(self) -> None:
        """The machine dies: SIGKILL to all its processes, its sshd among them; nothing more comes from its cable."""
        self.pull_cable()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    def pull_cable(self) -> None:
        subprocess.run(self.inside("ip", "link", "set", "eth0", "down"), check=True)


@dataclass
class Nodes:
    """Some nodes, and how a job on them is started from the first."""

    folder: Path
    nodes: list[Node] = field(default_factory=list)

    def __getitem__(self, i: int) -> Node:
        return self.nodes[i]

    def hostfile(self, slots: int = 1, only: Sequence[int] | None = None) -> Path:
        chosen = self.nodes if only is None else [self.nodes[i] for i in only]
        path = self.folder / "hosts"
        path.write_text("".join(f"{node.address} slots={slots}\n" for node in chosen))
        return path

    def running(self, word: str) -> list[list[str]]:
        """The command lines on all nodes that have this word in them."""
        lines = []
        for process in (p for node in self.nodes for p in node.processes()):
            with suppress(psutil.NoSuchProcess):
                lines.append(process.cmdline())
        return [line for line in lines if word in line]

    def variables(self) -> dict[str, str]:
        """For the command that starts a job."""
        ssh = f"-F {self.folder}/ssh_config"
        openmpi = {"PRTE_MCA_plm_ssh_agent": f"ssh {ssh}", "OMPI_ALLOW_RUN_AS_ROOT": "1"}
        openmpi["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
        return {"PDSH_SSH_ARGS_APPEND": ssh, "GLOO_SOCKET_IFNAME": "eth0", **openmpi}


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, env=os.environ | {"PATH": _PATH})


@contextmanager
def network(folder: Path, count: int, *, homes: Sequence[Path] = ()) -> Iterator[Nodes]:
    """That many nodes; skips the test, with the reason, where there can be none."""
    if reason := missing():
        pytest.skip(reason)
    own = f"bmt{os.getpid() % 100_000}"
    switch, nodes = f"{own}s", Nodes(folder)
    had_privileges = _PRIVILEGES.exists()
    made: list[str] = []
    try:
        _PRIVILEGES.mkdir(exist_ok=True)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key")
        (folder / "ssh_config").write_text(
            f"Host *\n  IdentityFile {folder}/key\n  UserKnownHostsFile {folder}/known\n"
            "  StrictHostKeyChecking no\n  LogLevel ERROR\n"
        )
        _run("ip", "netns", "add", switch)
        made.append(switch)
        _run("ip", "netns", "exec", switch, "ip", "link", "add", "br0", "type", "bridge")
        _run("ip", "netns", "exec", switch, "ip", "link", "set", "br0", "up")
        for i in range(count):
            name, address = f"{own}n{i}", f"10.77.0.{i + 1}"
            (folder / name).mkdir()
            node = Node(name, address, folder / name, homes[i] if homes else Path.home())
            _run("ip", "netns", "add", name)
            made.append(name)
            node.christen()
            nodes.nodes.append(node)
            _run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"p{i}", "netns", switch)
            _run("ip", "netns", "exec", switch, "ip", "link", "set", f"p{i}", "master", "br0", "up")
            _run(*node.inside("ip", "addr", "add", f"{address}/24", "dev", "eth0"))
            _run(*node.inside("ip", "link", "set", "eth0", "up"))
            _run(*node.inside("ip", "link", "set", "lo", "up"))
            node.start_sshd(folder / "key")
        _await_ssh(nodes)
        yield nodes
    finally:
        for node in nodes.nodes:
            for process in node.processes():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if node.sshd:
                node.sshd.wait(10)
            subprocess.run(["umount", node.host_name], capture_output=True)
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        if not had_privileges:
            with suppress(OSError):
                _PRIVILEGES.rmdir()


def _await_ssh(nodes: Nodes, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    for node in nodes.nodes:
        command = nodes[0].inside("ssh", "-F", nodes.folder / "ssh_config", node.address, "true")
        while subprocess.run(command, capture_output=True, timeout=seconds).returncode:
            assert time.monotonic() < end, f"no ssh to {node.address}: {(node.folder / 'log').read_text()}"
            time.sleep(0.1)
