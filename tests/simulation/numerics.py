"""The simulated model: small whole numbers in place of a model's, so that one wrong row, expert or block shows at once.

A token is a function of all tokens before it (as the KV cache holds them), of the experts' answers, of the seed and of
what the penalties count. All sums are exact, in whatever order.
"""

from __future__ import annotations

import zlib
from collections import Counter, abc
from collections.abc import Callable, Iterable
from typing import Any

import torch

from services.router.batch import Batch
from services.router.engine import Emission, Engine
from services.router.experts import Experts
from services.router.forward import StepResult
from services.router.messages import GenerateRequest, TokenLogprob
from services.router.scheduler import Work
from services.router.sequence import Sequence
from shared.checkpoint.config import ModelConfig, RopeConfig
from shared.compute import Compute
from shared.settings import MIB
from tests.simulation.loop import Process, process

VOCAB = 64
EOS = 0
WIDTH = 4
EXPERTS = 6
MASK = 0xFFFFFFFF


def make_config(moe_layers: int) -> ModelConfig:
    return ModelConfig(
        family="olmoe",
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=moe_layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=WIDTH,
        intermediate_size=1,
        moe_intermediate_size=1,
        shared_expert_intermediate_size=0,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        qk_norm="none",
        clip_qkv=None,
        sliding_windows=(None,) * moe_layers,
        moe_layers=tuple(range(moe_layers)),
        rope=RopeConfig("default", 1e4),
        dtype="float32",
        bos_token_id=None,
        eos_token_ids=(EOS,),
    )


def digest(tokens: list[int]) -> int:
    return zlib.crc32(bytes(tokens))


def row_of(x: int) -> list[float]:
    """A hidden state [4]."""
    return [float(x & 15), float(x >> 4 & 15), float(x >> 8 & 15), float(x >> 12 & 15)]


def experts_of(x: int) -> tuple[int, int]:
    first = (x >> 16) % EXPERTS
    return first, (first + 1 + (x >> 20) % (EXPERTS - 1)) % EXPERTS


def weights_of(x: int) -> tuple[float, float]:
    return float(1 + (x >> 24 & 3)), float(1 + (x >> 26 & 3))


def layer_of(layer: int, x: int) -> list[float]:
    """What the two experts add up to, [4]."""
    (e0, e1), (w0, w1) = experts_of(x), weights_of(x)
    return [w0 * (h + e0 + layer) + w1 * (h + e1 + layer) for h in row_of(x)]


def mixed(x: int, answer: Iterable[float]) -> int:
    """The next layer's state."""
    for value in answer:
        x = (x * 1_000_003 + int(value) + 1) & MASK
    return x


def chosen(x: int, request: GenerateRequest, counts: Counter[int], length: int) -> int:
    """The next token."""
    s = request.sampling
    if s.presence_penalty:
        x = mixed(x, (float(token * count) for token, count in sorted(counts.items())))
    if s.temperature > 0:
        x = mixed(x, (float(s.seed & 0xFFFF), float(length)))
    return x % VOCAB


def likelihood(x: int, token: int) -> TokenLogprob:
    return TokenLogprob(token, -float(x & 1023) / 64, 1 + (x & 7), [])


def oracle(request: GenerateRequest, moe_layers: int) -> tuple[list[int], list[TokenLogprob], str]:
    """What a request gives when nothing goes wrong: tokens, their log-probabilities, and why it ends."""
    output: list[int] = []
    scores: list[TokenLogprob] = []
    counts: Counter[int] = Counter()
    if not request.max_tokens:
        return output, scores, "length"
    while True:
        x = digest(request.token_ids + output)
        for layer in range(moe_layers):
            x = mixed(x, layer_of(layer, x))
        token = chosen(x, request, counts, len(request.token_ids) + len(output))
        output.append(token)
        counts[token] += 1
        scores.append(likelihood(x, token))
        if token in request.stop_token_ids or (token == EOS and not request.ignore_eos):
            return output, scores, "stop"
        if len(output) >= request.max_tokens:
            return output, scores, "length"


def prompt_scores(request: GenerateRequest) -> list[TokenLogprob | None]:
    """The log-probabilities of the prompt's tokens."""
    prompt = request.token_ids
    return [None, *(likelihood(digest(prompt[:i]), prompt[i]) for i in range(1, len(prompt)))]


def routing_of(tokens: list[int], moe_layers: int) -> list[list[list[int]]]:
    """[n, L, k]: the experts of each of `tokens` in each layer."""
    rows = []
    for end in range(1, len(tokens) + 1):
        x, row = digest(tokens[:end]), []
        for layer in range(moe_layers):
            row.append(list(experts_of(x)))
            x = mixed(x, layer_of(layer, x))
        rows.append(row)
    return rows


class SimulatedModel:
    """Stands where services/router/service.py expects a DenseModel's class, and its instance."""

    blocks = 16
    """KV blocks that fit into a MiB; of the world that runs."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.device = torch.device("cpu")

    @staticmethod
    def load_bytes(_checkpoint: Any, _itemsize: int) -> int:
        return 1

    @classmethod
    def block_bytes(cls, *_shape: Any) -> int:
        return MIB // (cls.blocks + 1)

    @classmethod
    def load(cls, checkpoint: Any, _dtype: Any, _device: Any, on_bytes: Callable[[int], None]) -> SimulatedModel:
        on_bytes(1)
        return cls(checkpoint.config)

    def allocate_cache(self, _blocks: int, _block_tokens: int) -> None:
        """The cache is the engine's, below."""


class SimulatedBatch:
    """What one step computes: the state of each row before the first layer."""

    def __init__(self, states: list[int], last_rows: list[int]) -> None:
        self.states = states
        self.last_rows = last_rows
        self.size = len(states)
        self.degraded: torch.Tensor | None = None
        self.routing: list[torch.Tensor] = []
        """[T, k] of each MoE layer."""


async def simulated_forward(
    model: SimulatedModel,
    experts: Experts,
    _compute: Compute,
    batch: SimulatedBatch,
    *,
    want_routing: bool = False,
) -> SimulatedBatch:
    """In place of services/router/forward.py: ask the experts for each layer, check each row of what they say."""
    states = batch.states
    for layer in model.config.moe_layers:
        hidden = torch.tensor([row_of(x) for x in states])
        index = torch.tensor([experts_of(x) for x in states])
        weights = torch.tensor([weights_of(x) for x in states])
        if want_routing:
            batch.routing.append(index)
        question = experts.question(layer, hidden, index, weights)
        owner = process.get()
        assert owner is not None
        SimulatedEngine.calls[owner.name] += len(question._calls)  # type: ignore[attr-defined]
        await question.ask()
        answers = question.result().tolist()
        if question.degraded is not None:
            batch.degraded = question.degraded if batch.degraded is None else batch.degraded | question.degraded
        whole = [True] * len(states) if question.degraded is None else (~question.degraded).tolist()
        for x, answer, is_whole in zip(states, answers, whole, strict=True):
            if is_whole and answer != layer_of(layer, x):
                SimulatedEngine.violate(f"{owner.name}: the experts' answer is wrong: {answer}")
        states = [mixed(x, answer) for x, answer in zip(states, answers, strict=True)]
    batch.states = states
    return batch


class SimulatedEngine(Engine):
    """The real engine with another model: a KV cache of tokens, and a hash for logits."""

    violate: Callable[[str], None]
    engines: list[SimulatedEngine]
    """All of the world that runs, those of dead routers among them."""
    calls: Counter[str]
    """What the experts were asked, by router; not how often."""
    check: Callable[[Process], None]
    """Called before and after each step."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        owner = process.get()
        assert owner is not None
        self.process = owner
        self.cache: dict[int, int] = {}
        SimulatedEngine.engines.append(self)

    async def step(self, work: list[Work]) -> None:
        self.check_blocks()
        await super().step(work)
        self.check_blocks()
        SimulatedEngine.check(self.process)

    def check_blocks(self) -> None:
        """Every block is free or one live sequence's."""
        pool, scheduler = self.pool, self._scheduler
        free = list(pool._free)
        held = [block for s in scheduler.running for block in s.blocks]
        waiting = [block for s in scheduler.waiting for block in s.blocks]
        if sorted(free + held) != list(range(1, pool.num_blocks + 1)) or waiting:
            self.violate(f"{self.process.name}: blocks leaked or doubled: free {sorted(free)}, held {sorted(held)}")
        known = set(map(id, self._sequences.values()))
        if any(id(s) not in known for s in (*scheduler.running, *scheduler.waiting)):
            self.violate(f"{self.process.name}: a sequence is scheduled that the engine has forgotten")

    def _build(self, work: list[Work]) -> Batch:
        states: list[int] = []
        last_rows: list[int] = []
        size = self.pool.block_tokens
        for w in work:
            s, end = w.sequence, w.start + w.count
            slots = [s.blocks[p // size] * size + p % size for p in range(end)]
            for slot, token in zip(slots[w.start :], s.tokens(w.start, end), strict=True):
                self.cache[slot] = token
            seen = [self.cache.get(slot, -1) for slot in slots]
            if seen != (s.request.token_ids + s.output)[:end]:
                self.violate(f"{self.process.name}: the KV cache of {s.request.id} holds another's tokens")
            states += [digest(seen[: p + 1]) for p in range(w.start, end)]
            last_rows.append(len(states) - 1)
        return SimulatedBatch(states, last_rows)  # type: ignore[return-value]

    def _sample(self, work: list[Work], batch: Batch, result: StepResult) -> list[Emission]:
        states, last_rows = result.states, batch.last_rows  # type: ignore[attr-defined]
        routing = torch.stack(result.routing, dim=1) if result.routing else None  # type: ignore[arg-type]
        emissions = []
        for w, row in zip(work, last_rows, strict=True):
            emission = Emission(w.sequence)
            s: Sequence = w.sequence
            end = w.start + w.count
            if s.request.prompt_logprobs >= 0 and end >= s.prompt_length and not s.prompt_logprobs:
                s.prompt_logprobs += prompt_scores(s.request)
            if s.request.return_routing and routing is not None and end > s.routing_rows_sent:
                new = min(w.count, end - s.routing_rows_sent)
                emission.routing = routing[row + 1 - new : row + 1].int()
            if w.completes and s.request.max_tokens:
                x = states[row]
                emission.token = chosen(x, s.request, s.counts, s.length)
                if s.request.logprobs >= 0:
                    emission.logprob = likelihood(x, emission.token)
            emissions.append(emission)
        return emissions


class SimulatedBank:
    """Stands where services/expert/worker.py expects an ExpertBank."""

    layers: abc.Sequence[int] = ()
    """The MoE layers of the world that runs."""

    def __init__(self, *_args: Any, **_named: Any) -> None:
        self._loaded: set[tuple[int, int]] = set()

    def bytes_of(self, experts: Iterable[int], *, num_layers: int | None = None) -> int:
        return len(list(experts)) * (len(self.layers) if num_layers is None else num_layers)

    def load(
        self, experts: Iterable[int], on_bytes: Callable[[int], None], layers: abc.Sequence[int] | None = None
    ) -> None:
        for expert in experts:
            for layer in self.layers if layers is None else layers:
                if (layer, expert) not in self._loaded:
                    on_bytes(1)
                    self._loaded.add((layer, expert))

    def drop(self, keys: Iterable[tuple[int, int]]) -> None:
        self._loaded -= set(keys)

    def compute(
        self,
        layer: int,
        hidden: torch.Tensor,
        token_index: torch.Tensor,
        expert_index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """[T, 4]: the sum over each token's pairs."""
        if not self._loaded.issuperset((layer, expert) for expert in expert_index.tolist()):
            SimulatedEngine.violate("a worker computes an expert that it has not loaded")
        terms = (hidden[token_index] + (expert_index + layer)[:, None]) * weights[:, None]
        return torch.zeros_like(hidden).index_add_(0, token_index, terms)
