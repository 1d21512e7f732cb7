"""What a benchmark ends with."""

import json
from pathlib import Path


def write_line(found: dict, out: Path | None) -> None:
    """Prints figures as a line of JSON, and writes it to a file where one is asked for."""
    line = json.dumps(found)
    if out:
        out.write_text(line + "\n")
    print(line)
