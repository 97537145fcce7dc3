"""A whole fleet on a simulated clock and a simulated bus: the real services, but for the model's numbers and HTTP.

Run by a plan, checked all along: every stream against the oracle as it grows, every block at every step, and at the end
that nothing is left: no task, no sequence, no block, no place, no open inbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog

from services.router.calls import HEDGE_SHARE, RETRY_RESERVE_PER_SECOND, RETRY_SHARE
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import MoeError
from tests.simulation.fleet import DEPLOYMENT, GRACE_SECONDS, Gateway, Node, make_service, stand_ins
from tests.simulation.loop import NOBODY, START, Process, SimulatedLoop, process, simulated_time
from tests.simulation.nats import SimulatedServer
from tests.simulation.numerics import SimulatedBank, SimulatedEngine, SimulatedModel, prompt_scores, routing_of
from tests.simulation.plan import Fault, Kind, Plan, Request, make_plan

SETTLE_SECONDS = 60.0
"""After the last request and the last fault: until nothing is under way any more."""
MOST_SECONDS = 400.0
"""Of simulated time in all."""
SLOW_SECONDS = 2.0
"""What a slow worker adds to a call, at most."""
NOTICE_SECONDS = 2.0
"""Until a gateway must have gone on elsewhere when a router is lost."""
AFTERMATH_SECONDS = 15.0
"""After a fault in which what follows may be its doing."""
COUNTED = {
    "generation.resumed",
    "experts.stalled",
    "expert.takeover",
    "client.silent",
    "experts.skipped",
    "experts.at_home",
    "plan.followed",
    "copies.loaded",
    "copies.dropped",
}
"""Log events that a report counts."""
REFUSALS = {"overloaded", "queue_timeout"}
"""How a fleet with too much to do answers; the client may come back."""
MOST_REFUSALS = 20


@dataclass
class Report:
    """What a run showed."""

    seed: int
    violations: list[str] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)
    """By request: `ok`, `left`, `died` with its gateway, or an error's code."""
    counts: Counter[str] = field(default_factory=Counter)
    digest: int = 0
    """Of every message that the server routed, with its time: two runs of a seed have the same."""
    seconds: float = 0.0
    """Simulated."""
    trace: list[str] = field(default_factory=list)


class World:
    """One run of a plan."""

    def __init__(self, plan: Plan, *, trace: bool) -> None:
        self.plan = plan
        self.report = Report(plan.seed)
        self.loop = SimulatedLoop()
        self.draw = random.Random(plan.seed ^ 0x5EED)
        self._tracing = trace
        self.server = SimulatedServer(
            self.loop, random.Random(plan.seed ^ 0xBEE), self.tell, latency=plan.latency, spikes=plan.spikes
        )
        counts: list[tuple[Kind, int]] = [
            ("expert", plan.workers),
            ("router", plan.routers),
            ("gateway", plan.gateways),
        ]
        self.nodes = [Node(kind, index) for kind, count in counts for index in range(count)]
        self._by_process: dict[Process, Node] = {}
        self._refused: dict[str, float] = {}
        """By request: in how many seconds its client should try again."""
        self._resumed: dict[str, float] = {}
        """By request: when it last went on with another router."""
        self.server.under_way = self._under_way

    # -- telling -----------------------------------------------------------------------------------------------------

    def tell(self, line: str) -> None:
        if self._tracing:
            self.report.trace.append(line)

    def say(self, text: str) -> None:
        self.tell(f"{self.loop.time():.6f} -- {text}")

    def violate(self, text: str) -> None:
        self.say(f"VIOLATION {text}")
        self.report.violations.append(f"{self.loop.time():.6f}: {text}")

    def _log(self, _logger: object, method: str, event: MutableMapping[str, Any]) -> Any:
        """structlog's last processor: into the trace, and a traceback is a violation."""
        owner = process.get()
        if event.get("exc_info") and not (owner is not None and owner.dead):
            self.violate(f"{owner and owner.name}: {event.get('event')}: {traceback.format_exc()}")
        name = event.get("event")
        if name in COUNTED:
            self.report.counts[str(name)] += 1
        if name == "generation.resumed":
            self._resumed[str(event["id"])] = self.loop.time()
        if self._tracing:
            self.say(f"{owner and owner.name} {method} {event}")
        raise structlog.DropEvent

    def _on_exception(self, _loop: object, context: dict[str, Any]) -> None:
        error = context.get("exception")
        shown = "".join(traceback.format_exception(error)) if error else ""
        self.violate(f"unhandled: {context.get('message')} {shown}")

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        self.loop.set_exception_handler(self._on_exception)
        with self._stand_ins(), simulated_time(self.loop):
            try:
                self.loop.run_until_complete(self._main())
            except RuntimeError as error:  # the loop's own: a deadlock
                self.violate(str(error))
            finally:
                self.report.seconds = self.loop.time()
                self.report.digest = self.server.digest
                self.report.counts["messages"] = self.server.messages
                self.report.counts["lost"] = self.server.lost
                for engine in SimulatedEngine.engines:
                    self.report.counts["preemptions"] += engine._scheduler.preemptions
                for node in self._by_process.values():
                    if node.kind == "router" and node.service is not None and node.service._experts is not None:
                        budgets = node.service._experts.calls
                        self.report.counts["retries"] += budgets.retries.taken
                        self.report.counts["retries refused"] += budgets.retries.refused
                        self.report.counts["hedges"] += budgets.hedges.taken
                self.loop.close()
        return self.report

    @contextlib.contextmanager
    def _stand_ins(self) -> Iterator[None]:
        SimulatedEngine.violate = self.violate
        SimulatedEngine.engines = []
        SimulatedEngine.calls = Counter()
        SimulatedEngine.check = self._check_budgets
        SimulatedModel.blocks = self.plan.blocks
        SimulatedBank.layers = range(self.plan.moe_layers)
        logs, state = structlog.get_config(), random.getstate()
        random.seed(self.plan.seed)
        structlog.configure(processors=[self._log], cache_logger_on_first_use=False)
        try:
            with stand_ins(self.server):
                yield
        finally:
            structlog.configure(**logs)
            random.setstate(state)

    async def _main(self) -> None:
        try:
            async with asyncio.timeout(MOST_SECONDS):
                await self._live()
        except TimeoutError:
            self.violate(f"the run takes more than {MOST_SECONDS:g} s: {self._left()}")
        finally:
            for node in self.nodes:
                await self._kill(node)

    async def _live(self) -> None:
        for node in self.nodes:
            self._start(node)
        await self._until(self._ready, 30, "the fleet to be ready")
        self.say("ready")
        monitor = Process(self.loop, "monitor")
        telling = monitor.start(self._tell_plans(), "plans")
        async with asyncio.TaskGroup() as group:
            for request in self.plan.requests:
                group.create_task(self._client(request))
            for fault in self.plan.faults:
                group.create_task(self._fault(fault))
        await self._until(lambda: not self._left(), SETTLE_SECONDS, "nothing to be left")
        telling.cancel()
        await asyncio.wait({telling})
        self._check_at_rest()
        for node in self.nodes:
            node.shutdown.set()
        for node in self.nodes:
            if node.task is not None:
                await asyncio.wait({node.task}, timeout=GRACE_SECONDS + 5)
                self._check_ended(node)
        await asyncio.sleep(1)
        if self.server.sessions:
            self.violate(f"connections are left: {[s.client.name for s in self.server.sessions]}")

    async def _tell_plans(self) -> None:
        """Each plan from its time on, again and again, as a monitor does; or two of one epoch in turns, as two would."""
        start = self.loop.time()
        bus = await Bus.connect("nats://simulated", "monitor", "monitor")
        try:
            while True:
                due = [plan for plan in self.plan.expert_plans if plan.time <= self.loop.time() - start]
                for plan in due:
                    if plan.epoch == due[-1].epoch:
                        with contextlib.suppress(MoeError):
                            await bus.publish(subjects.plan(DEPLOYMENT), wire.encode(plan))
                await asyncio.sleep(0.5)
        finally:
            await bus.abort()

    async def _until(self, predicate: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = self.loop.time() + seconds
        while not predicate():
            if self.loop.time() > deadline:
                self.violate(f"waited {seconds:g} s for {what}: {self._left()}")
                return
            await asyncio.sleep(0.25)

    # -- processes ---------------------------------------------------------------------------------------------------

    def _start(self, node: Node) -> None:
        node.process = Process(self.loop, node.name)
        self._by_process[node.process] = node
        node.shutdown = asyncio.Event()
        node.process.compute_seconds = lambda: self.plan.compute_seconds * (0.1 + self.draw.random())
        node.process.load_seconds = lambda: self.plan.load_seconds * (0.1 + self.draw.random())
        node.task = node.process.start(self._run(node), node.name)

    async def _run(self, node: Node) -> None:
        owner = process.get()
        try:
            node.service = make_service(node.kind, node.name, self.plan)
            await node.service.run(node.shutdown)
        except Exception as error:
            if owner is not None and not owner.dead:
                self.violate(f"{node.name} gives up: {error!r}")
            raise

    def _ready(self) -> bool:
        routers = [n for n in self.nodes if n.kind == "router" and n.alive]
        return (
            all(n.service is not None and n.service._state == "ready" for n in routers)
            and all(n.service is not None and n.service._state.ready for n in self.nodes if n.kind == "expert")
            and all(n.service is not None and n.service.ready for n in self.nodes if n.kind == "gateway")
        )

    async def _kill(self, node: Node) -> None:
        if node.process is None or node.process.dead:
            return
        for session in [s for s in self.server.sessions if s.client.process is node.process]:
            session.client.sever()
        await node.process.kill()

    async def _restart(self, node: Node, seconds: float) -> None:
        await asyncio.sleep(seconds)
        node.generation += 1
        self._start(node)

    async def _fault(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at)
        if fault.action == "nats":
            if self.server.up:
                self._count(fault)
                self.server.crash()
                await asyncio.sleep(fault.seconds)
                self.server.start()
            return
        node = next(n for n in self.nodes if (n.kind, n.index) == (fault.kind, fault.index))
        if node.busy or node.process is None or not node.alive:
            return
        node.busy = True
        self._count(fault)
        owner = node.process
        if fault.kind == "router" and (
            fault.action == "crash" or (fault.action == "stop" and fault.seconds > NOTICE_SECONDS)
        ):
            self._expect_resumption(node, fault)
        sessions = [s for s in self.server.sessions if s.client.process is owner]
        if fault.action == "crash":
            await self._kill(node)
            await self._restart(node, fault.seconds)
        elif fault.action == "stop":
            owner.stop()
            await asyncio.sleep(fault.seconds)
            owner.resume()
        elif fault.action == "reset":
            self.server.block(owner.name, fault.seconds, math.inf)
            await asyncio.sleep(fault.seconds)
            for session in sessions:
                self.server.reset(session)
        elif fault.action == "cut":
            self.server.block(owner.name, fault.seconds, 6 + 3 * self.draw.random())
            await asyncio.sleep(fault.seconds)
        elif fault.action == "slow":
            before = owner.compute_seconds
            owner.compute_seconds = lambda: SLOW_SECONDS * self.draw.random()
            await asyncio.sleep(fault.seconds)
            owner.compute_seconds = before
        else:
            node.shutdown.set()
            assert node.task is not None
            await asyncio.wait({node.task}, timeout=GRACE_SECONDS + 5)
            self._check_ended(node)
            await self._kill(node)
            await self._restart(node, fault.seconds)
        self.say(f"healed: {fault}")
        node.busy = False

    def _expect_resumption(self, node: Node, fault: Fault) -> None:
        """Within 2 s of a router's end its streams must go on elsewhere, unless something else goes wrong meanwhile."""
        others = [f for f in self.plan.faults if f is not fault and f.at <= fault.at + NOTICE_SECONDS]
        if any(f.at + f.seconds + AFTERMATH_SECONDS >= fault.at for f in others):
            return
        slow = {r.request.id for r in self.plan.requests if r.reader_seconds}  # they still read what came before
        sequences = node.service._engine.sequences() if node.service._engine else []
        names = [name for s in sequences if (name := s.request.id.split(".")[0]) not in slow]
        now = self.loop.time()
        slack = 8 * self.plan.latency * (100 if self.plan.spikes else 1)
        if not self.plan.spikes:
            self.loop.call_at(now + NOTICE_SECONDS + slack, self._check_resumed, names, now, context=NOBODY)

    def _check_resumed(self, names: list[str], since: float) -> None:
        for name in names:
            if self.report.outcomes.get(name) == "running" and self._resumed.get(name, 0.0) < since:
                self.violate(f"{name} stands still for more than {NOTICE_SECONDS:g} s after its router's end")
            elif self._resumed.get(name, 0.0) >= since:
                self.report.counts["resumed within 2 s"] += 1

    def _count(self, fault: Fault) -> None:
        self.say(str(fault))
        self.report.counts[f"{fault.action}" if fault.action == "nats" else f"{fault.action} {fault.kind}"] += 1

    # -- clients -----------------------------------------------------------------------------------------------------

    async def _client(self, request: Request) -> None:
        """Send a request, again if it is refused, until it is answered."""
        await asyncio.sleep(request.at)
        for _ in range(MOST_REFUSALS):
            node = await self._open_gateway(request)
            if node is None:
                return
            await self._send(node, request)
            pause = self._refused.pop(request.request.id, None)
            if pause is None:
                return
            self.report.counts["refused"] += 1
            await asyncio.sleep(pause)
        self.violate(f"{request.request.id} is refused {MOST_REFUSALS} times")

    async def _open_gateway(self, request: Request) -> Node | None:
        """The request's own, or, as nginx and the client's retry would have it, another, or the restarted one."""
        gateways = [n for n in self.nodes if n.kind == "gateway"]
        gateways = gateways[request.gateway :] + gateways[: request.gateway]
        deadline = self.loop.time() + 30
        while self.loop.time() < deadline:
            for node in gateways:
                if node.alive and node.service is not None and node.service.ready and not node.service.draining:
                    return node
            await asyncio.sleep(0.1)
        self.violate("no gateway is ready for 30 s")
        return None

    async def _send(self, node: Node, request: Request) -> None:
        assert node.process is not None
        name = request.request.id
        self.report.outcomes[name] = "running"
        task = node.process.start(self._read(node.service, request), name)
        if request.leaves_after is not None:
            await asyncio.wait({task}, timeout=request.leaves_after)
            if not task.done():
                self.report.outcomes[name] = "left"
                task.cancel()
        await asyncio.wait({task})
        if self.report.outcomes[name] == "running":
            self.report.outcomes[name] = "died"
            if not any(f.kind == "gateway" for f in self.plan.faults):
                self.violate(f"{name} ends with neither an answer nor an error")
        if not task.cancelled() and task.exception() is not None:
            self.violate(f"{name}: {task.exception()!r}")
        self.say(f"{name}: {self.report.outcomes[name]}")

    async def _read(self, gateway: Gateway, r: Request) -> None:
        """What the HTTP part does with a generation, and the client with its answer."""
        name = r.request.id
        tokens: list[int] = []
        scores: list[Any] = []
        prompt_scores_told: list[Any] = []
        routing: list[Any] = []
        text, reason = "", None
        own = asyncio.current_task()
        assert own is not None
        gateway.requests[own] = None
        try:
            request = msgspec.structs.replace(r.request, client=gateway.instance)
            async with contextlib.aclosing(gateway.generator.generate(request, r.stops)) as pieces:
                async for piece in pieces:
                    tokens += piece.token_ids
                    scores += piece.logprobs
                    text += piece.text
                    prompt_scores_told += piece.prompt_logprobs or []
                    for rows in piece.routing:
                        routing += rows.to_numpy().tolist()
                    reason = piece.finish_reason
                    if piece.degraded:
                        self.report.outcomes[name] = "degraded"
                    else:
                        self._check_so_far(r, tokens, scores, text)
                    await asyncio.sleep(r.reader_seconds)
            if self.report.outcomes[name] == "degraded":
                return
            self.report.outcomes[name] = "ok"
            if (tokens, text, reason) != (r.tokens, r.text, r.reason):
                self.violate(f"{name} ends with {tokens} {text!r} {reason}, not {r.tokens} {r.text!r} {r.reason}")
            if r.request.prompt_logprobs >= 0 and prompt_scores_told != prompt_scores(r.request):
                self.violate(f"{name}: the prompt's log-probabilities are {prompt_scores_told}")
            if r.request.return_routing:
                taken = routing_of(r.request.token_ids + r.tokens[:-1], self.plan.moe_layers)
                if routing != taken:
                    self.violate(
                        f"{name}: {len(routing)} rows of routing are not the {len(taken)} that its tokens took"
                    )
        except MoeError as error:
            self.report.outcomes[name] = error.code
            self.say(f"{name}: {error.code}: {error.message}")
            if error.code in REFUSALS and not tokens:
                self._refused[name] = max(1.0, error.retry_after_seconds)
            elif not self._may_fail(error.code):
                self.violate(f"{name} fails: {error.code}: {error.message}")
        finally:
            del gateway.requests[own]

    # -- checking ----------------------------------------------------------------------------------------------------

    def _check_so_far(self, r: Request, tokens: list[int], scores: list[Any], text: str) -> None:
        if tokens != r.tokens[: len(tokens)]:
            self.violate(f"{r.request.id}: tokens {tokens} are not the beginning of {r.tokens}")
        if not r.text.startswith(text):
            self.violate(f"{r.request.id}: text {text!r} is not the beginning of {r.text!r}")
        if r.request.logprobs >= 0 and scores != r.scores[: len(tokens)]:
            self.violate(f"{r.request.id}: the log-probabilities are not those of its tokens")

    def _may_fail(self, code: str) -> bool:
        """Whether the plan leaves a request no way to succeed: all who could serve a shard are away, one after another.

        Of one lost replica, or of one lost router, no request may hear.
        """
        lost = [f for f in self.plan.faults if f.kind == "expert" or f.action == "nats"]
        return code == "shard_unavailable" and len(lost) > 1

    def _under_way(self, owner: Process) -> int:
        node = self._by_process.get(owner)
        return node.service._bus.waiting if node and node.kind == "router" and node.service is not None else 0

    def _check_budgets(self, owner: Process) -> None:
        """No more calls are sent than are made, retried and hedged within the budgets, or were refused unheard."""
        if owner.dead:
            return
        experts = self._by_process[owner].service._experts
        calls = experts.calls
        made, sent = SimulatedEngine.calls[owner.name] + experts.calls_at_home, self.server.calls[owner.name]
        paid = calls.retries.taken + calls.hedges.taken
        if sent > made + paid + self.server.refusals[owner.name]:
            self.violate(f"{owner.name}: {sent} calls sent for {made}, {paid} paid for by budgets")
        reserve = RETRY_RESERVE_PER_SECOND * (self.loop.time() - START + 1)
        if calls.retries.taken > RETRY_SHARE * made + reserve:
            self.violate(f"{owner.name}: {calls.retries.taken} retries of {made} calls")
        if calls.hedges.taken > HEDGE_SHARE * made + 1:
            self.violate(f"{owner.name}: {calls.hedges.taken} hedges of {made} calls")

    def _left(self) -> list[str]:
        """What is still under way, or was left behind."""
        left: list[str] = []
        for node in self.nodes:
            if not node.alive or node.service is None:
                continue
            if node.kind == "router" and node.service._engine is not None:
                left += [f"{node.name}: {s.request.id}" for s in node.service._engine.sequences()]
                left += [f"{node.name}: reply of {name}" for name in node.service._replies]
            if node.kind == "gateway" and node.service.ready:
                g = node.service
                if g.admission.running or g.admission.waiting:
                    left.append(f"{node.name}: {g.admission.running} running, {g.admission.waiting} waiting")
                if g.generator._farewells:
                    left.append(f"{node.name}: farewells")
            bus = node.service.bus if node.kind == "gateway" and node.service.ready else None
            bus = node.service._bus if node.kind == "router" and hasattr(node.service, "_bus") else bus
            if bus is not None and bus.waiting:
                left.append(f"{node.name}: {bus.waiting} open inboxes")
        return left

    def _check_at_rest(self) -> None:
        for engine in SimulatedEngine.engines:
            if not engine.process.dead:
                engine.check_blocks()
                if engine.pool.free != engine.pool.num_blocks:
                    self.violate(f"{engine.process.name}: {engine.pool.num_blocks - engine.pool.free} blocks leaked")

    def _check_ended(self, node: Node) -> None:
        """A process that was asked to end has ended, in time and whole."""
        assert node.task is not None
        assert node.process is not None
        if not node.task.done():
            self.violate(f"{node.name} does not end: {[t.get_name() for t in node.process.tasks]}")
        elif not node.task.cancelled() and node.task.exception() is not None:
            self.violate(f"{node.name} ends with {node.task.exception()!r}")
        elif node.process.tasks:
            self.violate(f"{node.name} leaves tasks: {[t.get_name() for t in node.process.tasks]}")


def simulate(seed: int, *, trace: bool = False) -> Report:
    """Run what `seed` stands for."""
    return World(make_plan(seed), trace=trace).run()
