"""`python -m services.router`: one router, configured by the environment."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would take the neighbours' cores

from services.router.service import serve
from shared.errors import StartError
from shared.service import run_process
from shared.settings import RouterSettings, load, refuse


def main() -> None:
    try:
        settings = load(RouterSettings)
    except StartError as error:
        refuse(error)
    run_process("router", settings, lambda shutdown: serve(settings, shutdown))


if __name__ == "__main__":
    main()
