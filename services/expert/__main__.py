"""`python -m services.expert`: one expert worker, configured by the environment."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would take the neighbours' cores

from services.expert.worker import serve
from shared.errors import StartError
from shared.service import run_process
from shared.settings import ExpertSettings, load, refuse


def main() -> None:
    try:
        settings = load(ExpertSettings)
    except StartError as error:
        refuse(error)
    run_process("expert", settings, lambda shutdown: serve(settings, shutdown))


if __name__ == "__main__":
    main()
