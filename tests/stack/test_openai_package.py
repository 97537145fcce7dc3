"""The openai package works unchanged, for both endpoints, streaming or not."""

from __future__ import annotations

from openai import AsyncOpenAI

from tests.running import Stack


def client(stack: Stack) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="none", max_retries=0)


async def test_completions_streaming_and_not_say_the_same(stack: Stack) -> None:
    async with client(stack) as openai:
        whole = await openai.completions.create(model="demo", prompt="def read(", max_tokens=12, temperature=0)
        stream = await openai.completions.create(
            model="demo",
            prompt="def read(",
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


async def test_chat_streaming_and_not_say_the_same(stack: Stack) -> None:
    async with client(stack) as openai:
        whole = await openai.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "sort a list"}], max_tokens=8, temperature=0
        )
        stream = await openai.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "sort a list"}],
            max_tokens=8,
            temperature=0,
            stream=True,
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"


async def test_a_seed_repeats_and_choices_differ(stack: Stack) -> None:
    # One at a time: the demo model is bf16, where rounding depends on what else is in the batch.
    async with client(stack) as openai:
        first, second = [
            await openai.completions.create(model="demo", prompt="import ", max_tokens=16, seed=5) for _ in range(2)
        ]
        several = await openai.completions.create(model="demo", prompt="import ", max_tokens=16, seed=5, n=3)
    assert first.choices[0].text == second.choices[0].text
    assert len({choice.text for choice in several.choices}) > 1


async def test_echo_gives_the_prompts_logprobs(stack: Stack) -> None:
    async with client(stack) as openai:
        answer = await openai.completions.create(
            model="demo", prompt="import os\n", max_tokens=0, echo=True, logprobs=1, temperature=0
        )
    choice = answer.choices[0]
    assert choice.text == "import os\n"
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    scores: list[float | None] = list(choice.logprobs.token_logprobs)
    assert scores[0] is None
    assert all(score is not None and score < 0 for score in scores[1:])


async def test_a_stop_string_ends_the_text_before_it(stack: Stack) -> None:
    async with client(stack) as openai:
        free = await openai.completions.create(model="demo", prompt="def read(", max_tokens=24, temperature=0)
        stop = free.choices[0].text[6:9]
        cut = await openai.completions.create(model="demo", prompt="def read(", max_tokens=24, temperature=0, stop=stop)
    assert cut.choices[0].text == free.choices[0].text[: free.choices[0].text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
