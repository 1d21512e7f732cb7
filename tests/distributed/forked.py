"""Starts the ranks of a job on this machine by forking a process that has imported the libraries long before.

    python forked.py serve SOCKET               imports, then forks jobs until its stdin is closed; removes its folder
    python forked.py run SOCKET RANKS PORT ...  a job: a script, `-m` and a module, or `-c` and code; its arguments

Importing is most of a small job, and DeepSpeed's launcher does it three times in a row; a test that is not about the
launcher starts its job here. The ranks are told what the launcher tells them, but for `--local_rank`, and have the
directory, the environment and the output of `run`, which ends with the status of the first rank that fails. When it is
killed, so are the ranks. 0 ranks: a plain process.
"""

import json
import os
import runpy
import select
import shutil
import signal
import socket
import sys
import threading


def serve(path: str) -> None:
    from bmtpt_ds.imports import quick_imports
    from bmtpt_ds.quiet import quieten

    quieten(verbose=False)
    with quick_imports():
        import bmtpt_ds.commands.pipeline
        import bmtpt_ds.commands.predict
        import bmtpt_ds.commands.prepare  # noqa: F401
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a job's process ended
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listening:
        listening.bind(f"{path}.new")
        listening.listen()
        os.rename(f"{path}.new", path)
        while listening in select.select([listening, sys.stdin], [], [])[0]:
            job, _ = listening.accept()
            with job:
                if os.fork() == 0:
                    be_job(job)
                    leave()
    shutil.rmtree(os.path.dirname(path))


def leave() -> None:
    """Ends a rank whose script has come to its end as `bmtpt` ends: a library's thread may not abort it any more."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def be_job(job: socket.socket) -> None:
    """Forks the ranks of a job and tells its status once they have ended, or one has failed."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told, streams, *_ = socket.recv_fds(job, 1 << 20, 3)
    asked = json.loads(told)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    for stream, file in enumerate(streams):
        os.dup2(file, stream)
    pids = set()
    for rank in range(asked["ranks"] or 1):
        pid = os.fork()
        if pid == 0:
            be_rank(rank, **asked)
            return
        pids.add(pid)
    threading.Thread(target=end_with, args=(job,), daemon=True).start()
    status = 0
    while pids and not status:
        pid, ended = os.wait()
        pids.remove(pid)
        status = os.waitstatus_to_exitcode(ended)
    job.send(str(status).encode())
    os.killpg(0, signal.SIGKILL)


def end_with(job: socket.socket) -> None:
    """Ends the job, ranks and all, when nobody waits for it any longer."""
    job.recv(1)
    os.killpg(0, signal.SIGKILL)


def be_rank(rank: int, *, ranks: int, port: str, what: list[str], **_: object) -> None:
    if ranks:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if what[0] == "-m":
        sys.argv = what[1:]
        runpy.run_module(what[1], run_name="__main__", alter_sys=True)
    elif what[0] == "-c":
        exec(what[1], {"__name__": "__main__"})
    else:
        sys.argv = what
        runpy.run_path(what[0], run_name="__main__")


def run(path: str, ranks: str, port: str, *what: str) -> int:
    """The status of a job; 1 if it has ended without any."""
    asked = {"ranks": int(ranks), "port": port, "what": what, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as job:
        job.connect(path)
        socket.send_fds(job, [json.dumps(asked).encode()], [0, 1, 2])
        status = int(job.recv(10) or "1")
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    _, how, *rest = sys.argv
    sys.exit({"serve": serve, "run": run}[how](*rest))
