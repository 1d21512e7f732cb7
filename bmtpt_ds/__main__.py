"""`python -m bmtpt_ds` and `deepspeed --module bmtpt_ds`."""

from bmtpt_ds.cli import program

if __name__ == "__main__":
    program()
