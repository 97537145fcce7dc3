"""`openmoe chat`: a conversation in the terminal, streamed from a running gateway."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import httpx

from shared.errors import StartError

READ_SECONDS = 300


class ChatClient:
    """One conversation with one server."""

    def __init__(self, url: str, api_key: str | None, parameters: dict[str, Any], system: str | None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(10, read=READ_SECONDS)
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, trust_env=False)
        self._url = url
        self._parameters = parameters
        self._messages = [{"role": "system", "content": system}] if system else []

    def say(self, text: str) -> Iterator[str]:
        """Add `text` to the conversation; yields the answer as it comes.

        Raises:
            StartError: the server cannot be reached, or refuses.

        """
        self._messages.append({"role": "user", "content": text})
        body = {"messages": self._messages, "stream": True, **self._parameters}
        answer: list[str] = []
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                _check(response)
                for line in response.iter_lines():
                    piece = _delta(line)
                    answer.append(piece)
                    yield piece
        except httpx.HTTPError as error:
            self._messages.pop()
            raise StartError(f"{self._url}: {error or type(error).__name__}; is `openmoe up` running?") from None
        except StartError:
            self._messages.pop()
            raise
        self._messages.append({"role": "assistant", "content": "".join(answer)})


def _delta(line: str) -> str:
    """The text that one line of the event stream adds."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return ""
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise StartError(event["error"]["message"])
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])


def _check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    body = response.read()
    try:
        reason = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        reason = body.decode(errors="replace")[:200]
    raise StartError(reason)


def chat(client: ChatClient) -> None:
    """Read questions from the terminal, or from a pipe, until its end."""
    terminal = sys.stdin.isatty()
    if terminal:
        sys.stdout.write("Ctrl-D ends the conversation.\n")
    while True:
        try:
            question = input("> ") if terminal else sys.stdin.readline().rstrip("\n")
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        if not question:
            if terminal:
                continue
            return
        try:
            for piece in client.say(question):
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stdout.write(" (stopped)")
        except StartError as error:
            if not terminal:
                raise
            sys.stderr.write(f"error: {error}")
        sys.stdout.write("\n")
