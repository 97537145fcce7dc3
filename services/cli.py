"""`openmoe …`: the whole stack on one machine, one service, or a look at what runs."""

from __future__ import annotations

import asyncio
import random
import runpy
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from shared.errors import StartError
from shared.settings import DEMO_MODEL, refuse
from training.command import train

Number = TypeVar("Number", int, float)
app = typer.Typer(
    help="Serve Mixture-of-Experts models from small services over NATS.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command()
def up(
    model: Annotated[Path, typer.Option(envvar="MODEL", help="Folder of a Hugging Face checkpoint.")] = DEMO_MODEL,
    host: Annotated[str, typer.Option(envvar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="PORT", help="Port to listen on; 0: a free one.")] = 8000,
    experts: Annotated[int, typer.Option(envvar="WORKERS", min=1, max=1024, help="Expert workers.")] = 2,
    routers: Annotated[int, typer.Option(min=1, max=64, help="Routers.")] = 1,
    shards: Annotated[int | None, typer.Option(envvar="EXPERT_SHARDS", min=1, help="Default: one per worker.")] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="DATA_DIR",
            help="Keep placement epochs and audit records here, across restarts. Default: a temporary folder.",
        ),
    ] = None,
) -> None:
    """Start everything on this machine: nats-server, gateway, router, expert workers, monitor.

    Example: openmoe up --model ./OLMoE-1B-7B --experts 4
    """
    from services import local

    plan = local.Plan(model.expanduser().resolve(), host, port, experts, routers, shards, data_dir, supervised=True)
    try:
        asyncio.run(local.up(plan))
    except local.ChildRefusedError:
        raise typer.Exit(2) from None
    except StartError as error:
        refuse(error)


def _service(name: str) -> None:
    @app.command(name=name, help=f"Run one {name}, configured by the environment.")
    def run() -> None:
        runpy.run_module(f"services.{name}", run_name="__main__")


app.command()(train)

for _name in ("gateway", "router", "expert", "monitor"):
    _service(_name)


@app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", help="Show it each second anew, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
    nats_url: Annotated[str, typer.Option(envvar="NATS_URL")] = "nats://127.0.0.1:4222",
) -> None:
    """Show the fleet: who runs, how busy, which shards have how many workers, and what needs attention.

    Exit code: 0, or 1 if NATS does not answer.

    Example: openmoe status --watch
    """
    from rich.console import Console

    from services import fleet_table
    from shared.logs import silence_logs

    silence_logs()
    if watch and as_json:
        refuse(StartError("--watch and --json exclude each other; give one"))
    try:
        if watch:
            asyncio.run(fleet_table.live(nats_url, Console()))
            return
        glance = asyncio.run(fleet_table.once(nats_url))
    except StartError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        return
    if as_json:
        typer.echo(fleet_table.as_json(glance))
    else:
        Console().print(fleet_table.layout(glance))


@app.command()
def audit(
    last: Annotated[int, typer.Option(min=1, max=100_000, help="So many of the newest records.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="All that is kept, as JSON.")] = False,
    nats_url: Annotated[str, typer.Option(envvar="NATS_URL")] = "nats://127.0.0.1:4222",
) -> None:
    """Show what the monitor keeps: who serves which shard, and what happened when, by whom and why.

    Example: openmoe audit --last 100 --json
    """
    from rich.console import Console

    from services import audit_table
    from shared.logs import silence_logs

    silence_logs()
    try:
        kept = asyncio.run(audit_table.read(nats_url, last))
    except StartError as error:
        refuse(error)
    if as_json:
        typer.echo(audit_table.as_json(kept))
    else:
        for table in audit_table.tables(kept):
            Console(markup=False).print(table)


@app.command()
def scale(
    counts: Annotated[list[str], typer.Argument(help="expert=N, router=N or both.")],
    nats_url: Annotated[str, typer.Option(envvar="NATS_URL")] = "nats://127.0.0.1:4222",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait until it is done or begun.")] = 200,
) -> None:
    """Change how many expert workers and routers there are; it stands for SCALING_COOLDOWN_SECONDS.

    More start, fewer drain first: no request fails. Exit code 1 if it could not be done.

    Example: openmoe scale expert=4 router=2
    """
    from services import scale_command

    try:
        reply = asyncio.run(scale_command.scale(nats_url, scale_command.parse(counts), timeout))
    except StartError as error:
        refuse(error)
    except scale_command.ScalingRefusedError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(scale_command.sentence(reply))


@app.command()
def smoke(
    url: Annotated[str, typer.Argument(help="A running gateway.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="API_AUTH_TOKEN", help="Bearer token.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for each answer.")] = 30,
) -> None:
    """Check a deployment: health, a completion, a stream, routing, metrics. Exit code 1 if one of them fails."""
    from rich.console import Console

    from services import smoke as checks

    results = checks.smoke(url, api_key, timeout)
    Console().print(checks.smoke_table(results))
    raise typer.Exit(0 if all(result.ok for result in results) else 1)


@app.command()
def load(
    url: Annotated[str, typer.Argument(help="A running gateway.")] = "http://127.0.0.1:8000",
    rate: Annotated[float, typer.Option(min=0.01, max=10_000, help="Requests per second.")] = 5,
    duration: Annotated[float, typer.Option(min=0.1, max=86_400, help="Seconds.")] = 10,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 16,
    stream: Annotated[bool, typer.Option(help="Stream the answers.")] = True,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for each answer.")] = 60,
    max_failures: Annotated[int, typer.Option(min=0, help="More failed requests: exit code 1.")] = 0,
    max_p99: Annotated[float | None, typer.Option(min=0, help="A higher p99, in seconds: exit code 1.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of arrivals and prompts. Default: a new one, so no answer is cached.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="API_AUTH_TOKEN", help="Bearer token.")] = None,
) -> None:
    """Send open-loop load, report latency from the scheduled send, and pass or fail.

    Example: openmoe load http://127.0.0.1:8000 --rate 10 --duration 30 --max-p99 2
    """
    from rich.console import Console

    from services import load as generator

    plan = generator.Load(
        url,
        rate,
        duration,
        max_tokens,
        stream,
        timeout,
        api_key,
        seed=random.SystemRandom().getrandbits(32) if seed is None else seed,
        max_failures=max_failures,
        max_p99=max_p99,
    )
    console = Console()
    try:
        came = asyncio.run(generator.run(plan, console))
    except StartError as error:
        refuse(error)
    console.print(generator.load_table(plan, came))
    reasons = generator.verdict(plan, came)
    for reason in reasons:
        typer.echo(f"failed: {reason}", err=True)
    raise typer.Exit(1 if reasons else 0)


def _numbers(option: str, text: str | None, kind: type[Number], low: float, high: float) -> tuple[Number, ...]:
    """The numbers of a list like 1,4,16.

    Raises:
        StartError: one of them is none, or out of range.

    """
    try:
        values = tuple(kind(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise StartError(f"{option} {text}: not numbers; it looks like 1,4,16") from None
    if not all(low <= value <= high for value in values):
        raise StartError(f"{option} {text}: from {low:g} to {high:g}, please")
    return values


@app.command()
def bench(
    url: Annotated[str, typer.Option(help="A running gateway.")] = "http://127.0.0.1:8000",
    concurrency: Annotated[
        str | None, typer.Option(help="Closed loop: so many streams at once; a row for each. Default: 1,4,16.")
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Open loop: so many requests per second, arriving at random; a row for each.")
    ] = None,
    duration: Annotated[float | None, typer.Option(min=0.1, max=3600, help="Seconds of each row. Default: 10.")] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Requests of each row, in place of --duration.")
    ] = None,
    shape: Annotated[
        Literal["completion", "chat", "forward"],
        typer.Option(help="Token ids to /v1/completions, words to the chat, or float32 to one MoE layer."),
    ] = "completion",
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, max=1_000_000, help="Tokens of each prompt (chat: about). Default: 128; rows of forward: 1."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Tokens of each answer.")] = 64,
    layer: Annotated[int | None, typer.Option(min=0, help="Of forward. Default: the first MoE layer.")] = None,
    warmup: Annotated[int, typer.Option(min=0, max=10_000, help="Requests before the first row.")] = 4,
    timeout: Annotated[float, typer.Option(min=0.1, max=86_400, help="Seconds for each answer.")] = 120,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of arrivals and prompts. Default: a new one, so no answer is cached.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.json and report.html. Default: a new one here.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="API_AUTH_TOKEN", help="Bearer token.")] = None,
) -> None:
    """Measure a running stack: throughput and latencies for several loads, each a row of the table.

    A closed loop (--concurrency) keeps so many streams busy: it shows what the stack can do.

    An open loop (--rate) sends requests when they are due and counts latency from then, so that no stall can hide.

    Prompts are random and never the same, so that no cache answers. Figures and plots go to --output.

    Exit code: 0 all came back, 1 some failed, 2 nothing could be measured, 130 Ctrl-C (finished rows are kept).

    Example: openmoe bench --concurrency 1,4,16 --rate 2,8 --duration 30 --output before

    Example: openmoe bench --shape forward --concurrency 64
    """
    import uvloop
    from rich.console import Console

    from services import benchmark, benchmark_report

    if duration is not None and requests is not None:
        refuse(StartError("--duration and --requests exclude each other; give one"))
    console = Console()
    try:
        streams = _numbers("--concurrency", concurrency, int, 1, benchmark.MAX_IN_FLIGHT)
        rates = _numbers("--rate", rate, float, 0.01, 100_000)
        plan = benchmark.Plan(
            url,
            shape,
            streams or (() if rates else (1, 4, 16)),
            rates,
            benchmark.Length(None if requests else duration or 10.0, requests),
            prompt_tokens or (1 if shape == "forward" else 128),
            max_tokens,
            layer,
            timeout,
            warmup,
            random.SystemRandom().getrandbits(32) if seed is None else seed,
            api_key,
        )
        folder = benchmark_report.folder(output)
        outcome = uvloop.run(benchmark.run(plan, console))
        for table in benchmark_report.tables(plan, outcome.rows):
            console.print(table)
        for note in benchmark_report.notes(outcome.rows):
            console.print(note, soft_wrap=True)
        paths = benchmark_report.write(folder, benchmark_report.report(plan, outcome))
    except StartError as error:
        refuse(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    typer.echo("\n".join(str(path) for path in paths))
    raise typer.Exit(130 if outcome.interrupted else 1 if outcome.failed else 0)


@app.command()
def chaos(
    minutes: Annotated[float, typer.Option(min=0.05, max=1440, help="Of load with strikes.")] = 10,
    kills: Annotated[int, typer.Option(min=0, max=100_000, help="Strikes: SIGKILL, or SIGSTOP for 1 to 5 s.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the strikes and the prompts; the same seed, the same schedule.")] = 1,
    targets: Annotated[str, typer.Option(help="What may be struck.")] = "expert,router,monitor,nats",
    model: Annotated[Path, typer.Option(envvar="MODEL", help="Folder of a Hugging Face checkpoint.")] = DEMO_MODEL,
    experts: Annotated[int, typer.Option(min=1, max=1024, help="Expert workers; two for each shard at least.")] = 4,
    shards: Annotated[int, typer.Option(min=1, help="Shards.")] = 2,
    routers: Annotated[int, typer.Option(min=1, max=64, help="Routers.")] = 2,
    streams: Annotated[int, typer.Option(min=1, max=1024, help="Requests in flight.")] = 8,
    prompts: Annotated[int, typer.Option(min=1, max=1024, help="Different requests.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 96,
    baseline: Annotated[float, typer.Option(min=1, max=3600, help="Seconds of load without strikes, before.")] = 30,
    timeout: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds for each answer.")] = 120,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    log: Annotated[
        Path | None, typer.Option(help="The services' log. Default: a temporary file, kept if the run does not pass.")
    ] = None,
) -> None:
    """Kill and stop random processes of a stack under load, and check that no user would notice.

    It starts a stack of its own, asks every prompt undisturbed, then streams them over and over while it strikes
    services that have a peer: every text, logprob, token count and finish_reason must be the undisturbed one's.

    Exit code: 0 no request failed and no answer was wrong, 1 otherwise, 2 it could not start, 130 Ctrl-C.

    Example: openmoe chaos --minutes 10 --kills 100 --seed 1

    Example: openmoe chaos --minutes 1 --kills 10 --targets router --json routers.json
    """
    from services import chaos_command
    from services.chaos import ChaosPlan

    try:
        plan = ChaosPlan(
            model.expanduser().resolve(),
            60 * minutes,
            kills,
            seed,
            chaos_command.targets(targets),
            experts,
            shards,
            routers,
            streams,
            prompts,
            max_tokens,
            baseline,
            timeout,
        )
        code = chaos_command.command(plan, json_file, log, markdown=markdown)
    except StartError as error:
        refuse(error)
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="A running gateway.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="API_AUTH_TOKEN", help="Bearer token.")] = None,
    system: Annotated[str | None, typer.Option(help="System message to begin with.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: the likeliest token each time.")] = 0.7,
) -> None:
    """Talk to a running gateway in the terminal; questions may also come through a pipe.

    Example: echo "open a file" | openmoe chat --temperature 0
    """
    from services import chat_client

    parameters = {"max_tokens": max_tokens, "temperature": temperature}
    try:
        chat_client.chat(chat_client.ChatClient(url, api_key, parameters, system))
    except StartError as error:
        refuse(error)


@app.command()
def config(
    markdown: Annotated[bool, typer.Option("--markdown", help="Defaults, as the README shows them.")] = False,
) -> None:
    """Check the environment and show every setting, its value, who reads it and what it means."""
    from rich.console import Console

    from services import config_table

    try:
        if markdown:
            typer.echo(config_table.markdown(), nl=False)
        else:
            Console().print(config_table.table())
    except StartError as error:
        refuse(error)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
