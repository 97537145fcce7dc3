"""`python -m services.monitor`: one monitor, configured by the environment."""

from __future__ import annotations

from services.monitor.service import serve
from shared.errors import StartError
from shared.service import run_process
from shared.settings import MonitorSettings, load, refuse


def main() -> None:
    try:
        settings = load(MonitorSettings)
    except StartError as error:
        refuse(error)
    run_process("monitor", settings, lambda shutdown: serve(settings, shutdown))


if __name__ == "__main__":
    main()
