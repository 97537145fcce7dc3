"""`python -m services.gateway`: one gateway, configured by the environment."""

from __future__ import annotations

from services.gateway.service import serve
from shared.errors import StartError
from shared.service import run_process
from shared.settings import GatewaySettings, load, refuse


def main() -> None:
    try:
        settings = load(GatewaySettings)
    except StartError as error:
        refuse(error)
    run_process("gateway", settings, lambda shutdown: serve(settings, shutdown))


if __name__ == "__main__":
    main()
