"""Chat with OpenAI's own package: only the base URL is ours."""

from __future__ import annotations

from openai import AsyncOpenAI

from tests.running import Stack


async def test_a_conversation_is_answered(stack: Stack) -> None:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any") as client:
        answer = await client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "open a file"}], max_tokens=12, temperature=0
        )

    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 12


async def test_a_streamed_answer_begins_with_its_role(stack: Stack) -> None:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any") as client:
        stream = await client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "open a file"}],
            max_tokens=12,
            temperature=0,
            stream=True,
        )
        deltas = [chunk.choices[0].delta async for chunk in stream]

    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas)


async def test_the_served_model_is_listed(stack: Stack) -> None:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any") as client:
        assert [model.id async for model in client.models.list()] == ["demo"]
