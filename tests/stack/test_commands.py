"""`openmoe smoke`, `load`, `chat`, `status` and `config` against a running stack."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from services.nats_server import free_port
from tests.running import Stack, environment, running_nats


async def openmoe(*arguments: str, stdin: bytes = b"", **settings: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**environment(**settings), "COLUMNS": "160", "PATH": os.environ["PATH"]},
    )
    async with asyncio.timeout(90):
        out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_smoke_passes_on_a_stack_that_works(stack: Stack) -> None:
    code, out, _ = await openmoe("smoke", stack.url)
    assert code == 0, out
    assert "failed" not in out
    assert all(name in out for name in ("health", "completion", "stream", "metrics"))


async def test_smoke_fails_where_nobody_answers() -> None:
    code, out, err = await openmoe("smoke", f"http://127.0.0.1:{free_port()}")
    assert code == 1
    assert "failed" in out
    assert "Traceback" not in out + err


async def test_load_passes_and_counts(stack: Stack) -> None:
    code, out, err = await openmoe("load", stack.url, "--rate", "8", "--duration", "2", "--max-tokens", "4")
    assert code == 0, out + err
    assert "0 failed" in out
    assert "first token" in out


async def test_load_fails_when_its_limit_is_broken(stack: Stack) -> None:
    limits = ("--rate", "40", "--duration", "1", "--max-p99", "0.000001")  # arrivals are drawn: five may be none
    code, _, err = await openmoe("load", stack.url, *limits)
    assert code == 1
    assert "p99" in err


async def test_chat_answers_a_question_from_a_pipe(stack: Stack) -> None:
    question = ("--url", stack.url, "--temperature", "0", "--max-tokens", "8")
    code, out, err = await openmoe("chat", *question, stdin=b"sort a list\n")
    assert code == 0, err
    assert out.strip()


async def test_chat_says_in_one_line_that_nobody_answers() -> None:
    code, _, err = await openmoe("chat", "--url", f"http://127.0.0.1:{free_port()}", stdin=b"hello\n")
    assert code == 2
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


async def test_status_shows_every_service(stack: Stack, nats_url: str) -> None:
    code, out, err = await openmoe("status", NATS_URL=nats_url)
    assert code == 0, err
    assert all(name in out for name in ("gateway", "router", "expert", "monitor"))
    assert "tokens/s" in out
    assert "alerts: " in out
    assert err == ""


async def test_status_is_one_json_object_for_tools(stack: Stack, nats_url: str) -> None:
    code, out, err = await openmoe("status", "--json", NATS_URL=nats_url)
    assert code == 0, err
    glance = json.loads(out)
    assert {i["service"] for i in glance["report"]["instances"]} >= {"gateway", "router", "expert", "monitor"}
    assert glance["report"]["throughput"]["requests_per_second"] is not None


async def test_status_watches_until_it_is_stopped(stack: Stack, nats_url: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.cli", "status", "--watch"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**environment(NATS_URL=nats_url), "COLUMNS": "160", "TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"},
    )
    assert process.stdout is not None
    async with asyncio.timeout(60):
        await process.stdout.readuntil(b"alerts: ")
        await process.stdout.readuntil(b"alerts: ")  # and a second time
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")


async def test_status_without_nats_is_one_line_and_exit_code_1() -> None:
    code, out, err = await openmoe("status", NATS_URL=f"nats://me:very-secret@127.0.0.1:{free_port()}")
    assert (code, out) == (1, "")
    assert err.startswith("error: NATS_URL=nats://127.0.0.1")
    assert len(err.splitlines()) == 1
    code, out, err = await openmoe("status", "--json", NATS_URL=f"nats://127.0.0.1:{free_port()}")
    assert (code, out, len(err.splitlines())) == (1, "", 1)


async def test_status_says_what_to_do_when_nobody_reports(tmp_path: Path) -> None:
    async with running_nats(tmp_path) as url:
        code, out, err = await openmoe("status", NATS_URL=url)
    assert code == 0, err
    assert "nobody reports: start services with `openmoe up`" in out


async def test_config_shows_what_is_set_and_names_what_is_wrong() -> None:
    code, out, _ = await openmoe("config", BATCH_SIZE="7", API_AUTH_TOKEN="very-secret")
    assert code == 0
    assert "very-secret" not in out
    code, _, err = await openmoe("config", BATCH_SIZE="many", PORT="99999999")
    assert code == 2
    assert "BATCH_SIZE" in err
    assert "PORT" in err
