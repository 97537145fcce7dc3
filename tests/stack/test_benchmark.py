"""`openmoe bench` against a running stack: figures that add up, reports, exit codes, one-line refusals."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from services.nats_server import free_port
from tests.benchmark.servers import DONE, TOKEN, USAGE, chunked, serving, whole
from tests.running import Stack, environment, wait_until
from tests.stack.test_commands import openmoe


async def bench(folder: Path, url: str, *arguments: str) -> tuple[int, str, str, dict[str, Any]]:
    """(exit code, standard output, standard error, report.json)."""
    code, out, err = await openmoe("bench", "--url", url, "--output", str(folder), *arguments)
    report = folder / "report.json"
    return code, out, err, json.loads(report.read_text()) if report.exists() else {}


async def test_closed_and_open_loops_in_one_run(stack: Stack, tmp_path: Path) -> None:
    loads = ("--concurrency", "1,4", "--rate", "20", "--requests", "6")
    code, out, err, report = await bench(tmp_path, stack.url, *loads, "--prompt-tokens", "20", "--max-tokens", "5")
    assert code == 0, out + err
    assert [row["name"] for row in report["rows"]] == ["1 stream", "4 streams", "20 req/s"]
    for row in report["rows"]:
        assert (row["done"], row["failed"], row["input_tokens"], row["output_tokens"]) == (6, 0, 20, 5)
        assert row["inter_token_latency"]["count"] == 6 * (5 / row["tokens_per_event"] - 1)
        assert row["output_tokens_per_second"] == pytest.approx(6 * 5 / row["seconds"])
        first, whole = row["time_to_first_token"], row["latency"]
        assert 0 < first["p50"] <= first["p99"] <= whole["max"] <= row["seconds"]
    assert report["server"]["model"] == "demo"
    assert "1 stream" in out
    assert str(tmp_path / "report.html") in out
    assert "<svg" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("shape", ["chat", "forward"])
async def test_other_shapes(stack: Stack, tmp_path: Path, shape: str) -> None:
    sizes = ("--prompt-tokens", "40", "--max-tokens", "4", "--requests", "5", "--concurrency", "2")
    code, out, err, report = await bench(tmp_path, stack.url, "--shape", shape, *sizes)
    assert code == 0, out + err
    (row,) = report["rows"]
    assert (row["done"], row["failed"]) == (5, 0)
    assert row["input_tokens"] == 40 if shape == "forward" else 20 < row["input_tokens"] < 80
    assert row["output_tokens"] == (0 if shape == "forward" else 4)


async def test_failures_are_counted_shown_and_the_exit_code(tmp_path: Path) -> None:
    sizes = ("--max-tokens", "200", "--requests", "3", "--concurrency", "1", "--warmup", "0")
    served = 0

    async def refuse_the_second(request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        if request.startswith(b"get"):
            writer.write(whole(b'{"data":[{"id":"m"}]}' if b"models" in request else b"{}"))
            return
        served += 1  # the first is the check
        refusal = whole(b'{"error":{"message":"[full]","code":"overloaded"}}', "429 No")
        writer.write(refusal if served == 3 else chunked(TOKEN, TOKEN, USAGE, DONE))

    async with serving(refuse_the_second) as url:
        code, out, err, report = await bench(tmp_path, url, *sizes)
    assert code == 1, out + err
    (row,) = report["rows"]
    assert (row["done"], row["failed"], row["failures"]) == (2, 1, {"HTTP 429: overloaded": 1})
    assert "failed: 1 stream: 1 × HTTP 429: overloaded: [full]" in out
    assert "[full]" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--concurrency", "1,x"), "--concurrency 1,x: not numbers"),
        (("--concurrency", "0"), "--concurrency 0: from 1 to"),
        (("--rate", "nan"), "--rate nan"),
        (("--duration", "1", "--requests", "1"), "exclude each other"),
        (("--prompt-tokens", "5000"), "exceed the 1024 tokens that demo can hold; lower one"),
        (("--shape", "forward", "--layer", "99"), "--layer 99: has no experts"),
    ],
)
async def test_wrong_arguments_are_one_line(
    stack: Stack, tmp_path: Path, arguments: tuple[str, ...], text: str
) -> None:
    code, out, err, _ = await bench(tmp_path, stack.url, *arguments)
    assert (code, err.count("\n")) == (2, 1), out + err
    assert err.startswith("error: ")
    assert text in err


async def test_a_server_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    code, out, err, _ = await bench(tmp_path, f"http://127.0.0.1:{free_port()}")
    assert (code, err.count("\n")) == (2, 1), out + err
    assert "cannot connect" in err
    assert "openmoe up" in err


async def test_a_wrong_key_is_one_line_that_says_so(tmp_path: Path) -> None:
    async def unauthorized(_request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(whole(b'{"error":{"message":"send the API key","code":"invalid_api_key"}}', "401 No"))

    async with serving(unauthorized) as url:
        code, out, err, _ = await bench(tmp_path, url, "--api-key", "wrong-key")
    assert (code, err.count("\n")) == (2, 1), out + err
    assert "send the API key; give the key with --api-key or API_AUTH_TOKEN" in err


async def test_ctrl_c_keeps_the_rows_that_were_finished(tmp_path: Path) -> None:
    hold = asyncio.Event()
    seen = 0

    async def hold_the_second_row(request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        if request.startswith(b"get"):
            writer.write(whole(b'{"data":[{"id":"m"}]}' if b"models" in request else b"{}"))
            return
        seen += 1  # check, row 1, row 2
        if seen <= 2:
            writer.write(chunked(TOKEN, TOKEN, USAGE, DONE))
        else:
            hold.set()

    async with serving(hold_the_second_row) as url:
        arguments = ("--url", url, "--output", str(tmp_path), "--concurrency", "1,2", "--requests", "1")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.cli", "bench", *arguments, "--warmup", "0"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**environment(), "PATH": os.environ["PATH"]},
        )
        await wait_until(hold.is_set, "the second row to begin", 30)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            out, err = await process.communicate()
    assert process.returncode == 130, out + err
    assert b"Traceback" not in err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["interrupted"]
    assert [row["done"] for row in report["rows"]] == [1]
