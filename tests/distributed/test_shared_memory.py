"""What a job on CPU ranks leaves in the machine's shared memory: nothing."""

from pathlib import Path

from tests import launch


def test_a_job_leaves_no_shared_memory(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, torch\n"
        "from bmtpt_ds.parallel import Ranks\n"
        "ranks, ones = Ranks(60), torch.ones(3)\n"
        "ranks.sum_(ones)\n"  # through the buffers, their names being gone
        "print(ones.tolist(), flush=True)\n"
        "os._exit(0)\n"  # the rest of an end is not looked at: beside other work a library's thread once aborted it
    )
    before = set(Path("/dev/shm").glob("deepspeed_*"))
    said = launch.run(launch.forked(2, worker), tmp_path / "log")
    assert said.count("[2.0, 2.0, 2.0]") == 2
    assert set(Path("/dev/shm").glob("deepspeed_*")) <= before
