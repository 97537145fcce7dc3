"""OpenAI's request bodies (https://platform.openai.com/docs/api-reference), with the parameters that servers add.

Unknown fields are ignored, as other servers do; known ones are checked for type and range.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_CHOICES = 128
MAX_PROMPTS = 2048
MAX_STOPS = 16
MAX_LOGPROBS = 20


Integer = Annotated[int, Field(strict=True)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Prompts = (
    Annotated[list[str], Field(max_length=MAX_PROMPTS)] | Annotated[list[list[TokenId]], Field(max_length=MAX_PROMPTS)]
)
# From left to right: a long prompt is looked at once, not by each alternative.
Prompt = Annotated[str | list[TokenId] | Prompts, Field(union_mode="left_to_right")]


class StreamOptions(BaseModel):
    include_usage: bool = False


class GenerationParameters(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    max_tokens: Annotated[Integer, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[Integer, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Annotated[Integer, Field(ge=1, le=MAX_CHOICES)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.stops) > MAX_STOPS or not all(self.stops):
            raise ValueError(f"stop: at most {MAX_STOPS} strings, none of them empty")
        if not all(key.isascii() and key.isdigit() and len(key) <= 10 for key in self.logit_bias or {}):
            raise ValueError("logit_bias: keys must be token ids")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self


class CompletionRequest(GenerationParameters):
    prompt: Prompt
    echo: bool = False
    logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: Integer | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of: not supported; use n")
        if self.suffix:
            raise ValueError("suffix: not supported by this model")
        return self


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def as_template_input(self) -> dict[str, Any]:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatRequest(GenerationParameters):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[Integer, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _logprobs_wanted(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        return self


class ForwardBody(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    layer: Annotated[Integer, Field(ge=0)]
    hidden_states: list[list[float]]


class RouteBody(BaseModel):
    model: str | None = None
    prompt: str | list[TokenId]


class TokenizeBody(BaseModel):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(BaseModel):
    model: str | None = None
    tokens: list[TokenId]


class ScaleBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    expert: Annotated[Integer, Field(ge=1, le=1024)] | None = None
    router: Annotated[Integer, Field(ge=1, le=1024)] | None = None

    @model_validator(mode="after")
    def _something_is_asked(self) -> Self:
        if self.expert is None and self.router is None:
            raise ValueError("expert: give a number of expert, of router, or of both")
        return self
