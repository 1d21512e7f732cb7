"""`python -m bmtpt_ds` and `deepspeed --module bmtpt_ds`."""

import sys

from bmtpt_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
