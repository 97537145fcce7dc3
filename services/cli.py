"""`openmoe …`: the whole stack on one machine, one service, or a look at what runs."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path
from typing import Annotated

import typer

from shared.errors import StartError
from shared.settings import DEMO_MODEL, refuse

app = typer.Typer(help="Serve Mixture-of-Experts models from small services over NATS.", no_args_is_help=True)


@app.command()
def up(
    model: Annotated[Path, typer.Option(envvar="MODEL", help="Folder of a Hugging Face checkpoint.")] = DEMO_MODEL,
    host: Annotated[str, typer.Option(envvar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", help="Port to listen on; 0: a free one.")] = 8000,
    experts: Annotated[int, typer.Option(envvar="WORKERS", min=1, max=1024, help="Expert workers.")] = 2,
    routers: Annotated[int, typer.Option(min=1, max=64, help="Routers.")] = 1,
    shards: Annotated[int | None, typer.Option(envvar="EXPERT_SHARDS", min=1, help="Default: one per worker.")] = None,
    data_dir: Annotated[Path | None, typer.Option(envvar="DATA_DIR", help="Keep NATS' data here.")] = None,
) -> None:
    """Start everything on this machine: nats-server, gateway, router, expert workers, monitor.

    Example: openmoe up --model ./OLMoE-1B-7B --experts 4
    """
    from services import local

    plan = local.Plan(model.expanduser().resolve(), host, port, experts, routers, shards, data_dir)
    try:
        asyncio.run(local.up(plan))
    except StartError as error:
        refuse(error)


def _service(name: str) -> None:
    @app.command(name=name, help=f"Run one {name}, configured by the environment.")
    def run() -> None:
        runpy.run_module(f"services.{name}", run_name="__main__")


for _name in ("gateway", "router", "expert", "monitor"):
    _service(_name)


@app.command()
def status(nats_url: Annotated[str, typer.Option(envvar="NATS_URL")] = "nats://127.0.0.1:4222") -> None:
    """Show the fleet: every instance's last report."""
    from rich.console import Console

    from services.fleet_table import fleet_table

    try:
        Console().print(asyncio.run(fleet_table(nats_url)))
    except StartError as error:
        refuse(error)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
