"""Streamed text comes at whole characters and adds up to the text that is not streamed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from services.router.messages import GenerateRequest, Sampling
from tests.fidelity.client import generate
from tests.running import Stack, Watcher, running_stack
from tests.stack.bytes_model import make_bytes_checkpoint, text_of, token, tokens
from tests.stack.looking import deployment_of, http

# Characters of one to four bytes; U+FFFD itself is one that a model may well say.
BIAS = {str(t): 60.0 for t in tokens("aé€𝄞\N{REPLACEMENT CHARACTER}")}
NEW_TOKENS = 40
PROMPT = "naïve €"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def babbler(tmp_path_factory: pytest.TempPathFactory, nats_url: str) -> AsyncIterator[Stack]:
    """Serves a model whose every token is one byte."""
    folder = tmp_path_factory.mktemp("bytes")
    path = make_bytes_checkpoint(folder / "bytes")
    async with running_stack(
        folder, "--model", str(path), "--experts", "1", NATS_URL=nats_url, LOG_LEVEL="WARNING"
    ) as stack:
        yield stack


async def stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """All events of a streamed answer, the final `[DONE]` checked."""
    async with client.stream("POST", path, json={**body, "stream": True}) as answer:
        raw = await answer.aread()
        assert answer.status_code == 200, raw
    lines = [line for line in raw.decode("utf-8").split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    events: list[dict[str, Any]] = [json.loads(line.removeprefix("data: ")) for line in lines]
    return events


def pieces(events: list[dict[str, Any]], index: int = 0) -> list[str]:
    return [c["text"] for event in events for c in event["choices"] if c["index"] == index]


async def whole(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def babble(seed: int, **more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": NEW_TOKENS, "seed": seed, "logit_bias": BIAS, "ignore_eos": True, **more}


async def test_no_character_is_split_and_the_pieces_are_the_text(babbler: Stack, watcher: Watcher) -> None:
    deployment = await deployment_of(babbler)
    bias = {int(t): value for t, value in BIAS.items()}
    said = ""
    async with http(babbler) as client:
        for seed in range(8):
            request = GenerateRequest(
                id=f"babble-{seed}",
                token_ids=tokens(PROMPT),
                max_tokens=NEW_TOKENS,
                sampling=Sampling(seed=seed, logit_bias=bias),
                ignore_eos=True,
            )
            expected = text_of((await generate(watcher.bus, deployment, request)).tokens)
            shown = pieces(await stream(client, "/v1/completions", babble(seed)))
            assert "".join(shown) == expected
            assert await whole(client, babble(seed)) == expected
            said += expected
    whole_characters = set(said) - {"\N{REPLACEMENT CHARACTER}"}
    assert {len(character.encode()) for character in whole_characters} == {1, 2, 3, 4}


async def test_an_open_character_is_held_back_until_it_is_whole(babbler: Stack) -> None:
    first, second = "é".encode()
    forced = {str(token(first)): 100.0}
    async with http(babbler) as client:
        events = await stream(client, "/v1/completions", babble(0, logit_bias=forced, temperature=0, max_tokens=5))
        shown = pieces(events)
        assert [text for text in shown if text] == ["\N{REPLACEMENT CHARACTER}" * 5]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        # The prompt ends in the middle of the character: the model's bytes are text of their own.
        body = {"prompt": [*tokens("caf"), token(first)], "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        forced = {str(token(second)): 100.0}
        assert "".join(pieces(await stream(client, "/v1/completions", {**body, "logit_bias": forced}))) == await whole(
            client, {**body, "logit_bias": forced}
        )


async def test_a_stop_string_never_shows_in_part(babbler: Stack) -> None:
    async with http(babbler) as client:
        for seed in range(4):
            free = await whole(client, babble(seed))
            for stop in ("€", "aa", "éa"):
                events = await stream(client, "/v1/completions", babble(seed, stop=[stop]))
                assert "".join(pieces(events)) == free.split(stop)[0]
                reason = "stop" if stop in free else "length"
                assert events[-1]["choices"][0]["finish_reason"] == reason


async def test_choices_of_one_stream_are_told_apart(babbler: Stack) -> None:
    body = {**babble(3), "n": 3, "prompt": [PROMPT, "é"]}
    async with http(babbler) as client:
        answer = (await client.post("/v1/completions", json=body)).json()
        events = await stream(client, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert len(answer["choices"]) == 6
    for choice in answer["choices"]:
        assert "".join(pieces(events, choice["index"])) == choice["text"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == answer["usage"]


async def test_echo_comes_first_and_whole(babbler: Stack) -> None:
    async with http(babbler) as client:
        events = await stream(client, "/v1/completions", babble(1, echo=True))
        assert pieces(events)[0].startswith(PROMPT)
        assert "".join(pieces(events)) == await whole(client, babble(1, echo=True))


async def test_an_error_before_the_first_event_keeps_its_status(babbler: Stack) -> None:
    async with http(babbler) as client:
        answer = await client.post("/v1/completions", json=babble(0, stream=True, model="other"))
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


async def test_many_streams_at_once_do_not_mix(babbler: Stack) -> None:
    async with http(babbler) as client:
        alone = [await whole(client, babble(seed)) for seed in range(8)]
        together = await asyncio.gather(*(stream(client, "/v1/completions", babble(seed)) for seed in range(8)))
    assert ["".join(pieces(events)) for events in together] == alone
