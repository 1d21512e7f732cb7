"""One rank of a node works for longer than a collective may take; started by `test_waiting.py`.

Arguments: seconds that a collective may take, a folder where the ranks write.
"""

import json
import sys
import time
from pathlib import Path

from bmtpt_ds.errors import UserError
from bmtpt_ds.parallel import Ranks

if __name__ == "__main__":
    *_, timeout, folder = sys.argv
    ranks, marks = Ranks(int(timeout)), Path(folder)

    def download() -> str:
        """Slow where it has not been done yet, as a download that goes to a cache."""
        if not (marks / "cache").exists():
            time.sleep(1.4 * int(timeout))
            (marks / "cache").write_text(f"by rank {ranks.rank}")
            (marks / f"downloaded-by-{ranks.rank}").touch()
        return (marks / "cache").read_text()

    def fail() -> None:
        raise UserError(f"rank {ranks.rank} cannot")

    seen = {"found": ranks.together(download, once_a_node=True)}
    try:
        ranks.together(fail, once_a_node=True)
    except UserError as mistake:
        seen["mistake"] = str(mistake)
    (marks / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    ranks.leave()
