"""Look inside: send hidden states through one MoE layer, and see which experts a text takes."""

from __future__ import annotations

import httpx
import pytest

from tests.running import Stack

HIDDEN = 256
EXPERTS = 8
TOP_K = 2


async def test_hidden_states_go_through_one_layer(stack: Stack) -> None:
    body = {"layer": 1, "hidden_states": [[0.1] * HIDDEN, [-0.1] * HIDDEN]}
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        answer = (await http.post("/v1/moe/forward", json=body)).json()

    assert [len(row) for row in answer["hidden_states"]] == [HIDDEN, HIDDEN]
    assert [len(row) for row in answer["top_k_index"]] == [TOP_K, TOP_K]
    # The demo model's gate weights add up to 1 for each token.
    assert [sum(row) for row in answer["top_k_weights"]] == pytest.approx([1, 1], abs=0.01)


async def test_each_token_of_a_text_takes_two_experts_in_each_layer(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        answer = (await http.post("/v1/moe/route", json={"prompt": "import os"})).json()

    assert "".join(answer["tokens"]) == "import os"
    assert [layer["layer"] for layer in answer["layers"]] == [0, 1, 2, 3]
    for layer in answer["layers"]:
        assert len(layer["experts"]) == len(answer["token_ids"])
        for chosen in layer["experts"]:
            assert len(set(chosen)) == TOP_K
            assert set(chosen) <= set(range(EXPERTS))


async def test_text_becomes_tokens_and_back(stack: Stack) -> None:
    async with httpx.AsyncClient(base_url=stack.url, timeout=30) as http:
        tokens = (await http.post("/tokenize", json={"prompt": "import os"})).json()["tokens"]
        text = (await http.post("/detokenize", json={"tokens": tokens})).json()["prompt"]

    assert text == "import os"
