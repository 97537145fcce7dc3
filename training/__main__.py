"""`python -m training`, for torchrun: the same command as `openmoe train`."""

from __future__ import annotations

import typer

from training.command import train

if __name__ == "__main__":
    typer.run(train)
