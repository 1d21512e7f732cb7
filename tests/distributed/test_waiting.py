"""What one rank of a node does for all of them may take longer than a collective: downloads do."""

import json
from pathlib import Path

import pytest

from tests import launch

TIMEOUT = 15  # seconds


@pytest.mark.slow
def test_ranks_wait_for_a_download_that_is_longer_than_their_timeout(tmp_path: Path) -> None:
    worker = Path(__file__).with_name("waiting_worker.py")
    launch.run(launch.deepspeed(2, worker, TIMEOUT, tmp_path), tmp_path / "log")
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert seen == [{"found": "by rank 0", "mistake": "rank 0 cannot"}] * 2
    assert [path.name for path in tmp_path.glob("downloaded-by-*")] == ["downloaded-by-0"]
