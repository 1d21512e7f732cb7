"""A command of bmtpt in which rank 1 raises an error in its fifth SVGD step, as a fault of ours would."""

import os

from bmtpt_ds import source
from bmtpt_ds.cli import program


def raise_in_step(number: int) -> None:
    step = source.svgd_step

    def raising(*arguments, **options):
        if arguments[5] == number:
            raise ArithmeticError("the sums do not add up")
        return step(*arguments, **options)

    source.svgd_step = raising


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        raise_in_step(5)
    program()
