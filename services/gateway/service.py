"""The gateway as a service: HTTP in front, the bus behind, reports each second."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import msgspec
import structlog
import uvicorn

from services.gateway.admission import Admission
from services.gateway.answers import Answers
from services.gateway.app import build_app
from services.gateway.context import REPORTS_SPACING_SECONDS, Context
from services.gateway.forwards import Forwards
from services.gateway.generation import Generator, Observations
from services.gateway.idempotency import Idempotency
from services.gateway.operations import health
from services.gateway.report import REPORT_SECONDS
from services.gateway.slow_readers import impatient_protocol
from services.gateway.text import TextTokenizer
from services.monitor.observations import History
from shared.checkpoint import Checkpoint
from shared.replicas import Replicas
from shared.service import base_status, instance_name, listen, serve_metrics, service_context
from shared.settings import GatewaySettings
from shared.status import Fleet, Status, StatusReporter

log = structlog.get_logger()

GC_THRESHOLDS = (10_000, 20, 50)
"""Python's default collects after 700 new objects, in the middle of every burst of requests."""


async def serve(settings: GatewaySettings, shutdown: asyncio.Event) -> None:
    """Run one gateway until `shutdown`, then let requests in flight finish.

    Raises:
        StartError: a wrong checkpoint, a taken port, no NATS.

    """
    checkpoint = Checkpoint.open(settings.model)
    tokenizer = TextTokenizer.open(settings.model)
    listener = listen("PORT", settings.host, settings.port)
    address = f"{settings.host}:{listener.getsockname()[1]}"
    instance = instance_name(settings, "gateway")
    base = base_status(settings, "gateway", instance, address)
    context: Context | None = None
    reporter: StatusReporter | None = None
    healthy = False
    _, stop_metrics = serve_metrics(settings, lambda: healthy)

    def status() -> Status:
        nonlocal healthy
        if context is None or reporter is None:
            return base
        healthy, _ = health(context)
        o = context.observations
        return msgspec.structs.replace(
            reporter.with_usage(base),
            deployment=context.deployment,
            state="draining" if context.draining else "ready",
            running=context.admission.running,
            waiting=context.admission.waiting,
            tokens_total=o.tokens,
            requests_total=o.finished,
            errors_total=o.failed,
            errors={**o.errors, "overloaded": o.errors.get("overloaded", 0) + context.admission.refused},
            latencies={name: histogram.counts() for name, histogram in o.latencies.items()},
            cache_lookups=context.answers.lookups,
            cache_hits=context.answers.hits,
            queue_limit=settings.max_queued_requests,
            cores=1.0,
        )

    async with contextlib.AsyncExitStack() as stack:
        stack.callback(stop_metrics)
        service = await stack.enter_async_context(service_context(settings, "gateway", instance, status))
        reporter = service.reporter
        deployment = checkpoint.deployment(settings.model_name)
        routers = Replicas("router", deployment)
        history = History(REPORT_SECONDS, spacing=REPORTS_SPACING_SECONDS)

        def hear(status: Status, now: float) -> None:
            routers.observe(status, now)
            history.observe(status, now)

        fleet = Fleet(tell=hear)
        await fleet.watch(service.bus)
        admission = Admission(
            settings.max_concurrent_requests,
            settings.max_queued_requests,
            settings.timeout_seconds,
            settings.max_queue_seconds,
        )
        observations = Observations(settings.model_name)
        answers = Answers.open(settings, deployment)
        stack.push_async_callback(answers.close)
        generator = Generator(
            service.bus, deployment, tokenizer, admission, observations, answers, routers, settings.timeout_seconds
        )
        forwards = Forwards(service.bus, deployment, checkpoint.config, routers, settings)
        stack.push_async_callback(forwards.close)
        idempotency = Idempotency.open(settings, deployment)
        stack.push_async_callback(idempotency.close)
        context = Context(
            settings,
            checkpoint.config,
            deployment,
            instance,
            service.bus,
            fleet,
            tokenizer,
            admission,
            observations,
            answers,
            generator,
            forwards,
            idempotency,
            history=history,
        )
        config = uvicorn.Config(
            build_app(context),
            http=impatient_protocol(settings.timeout_seconds),
            loop="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            proxy_headers=False,  # nothing here asks who the client is
            timeout_graceful_shutdown=1,  # what was to be waited for has been waited for by then
        )
        server = uvicorn.Server(config)
        # Signals belong to the process, which sets `shutdown`; uvicorn must leave them alone.
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        task = asyncio.create_task(server._serve([listener]), name="http")  # noqa: SLF001 - serve() takes over signals
        # What was built by now stays: the collector need not walk it again and again while requests make garbage.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        log.info("gateway.ready", url=f"http://{address}", instance=instance, deployment=deployment)
        reporter.touch()
        stop = asyncio.create_task(shutdown.wait(), name="shutdown")
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        context.draining = True
        await reporter.publish()
        try:
            async with asyncio.timeout(settings.grace_seconds):
                while context.open_requests:
                    await asyncio.sleep(0.02)
        except TimeoutError:
            log.warning("drain.cut_short", requests=context.open_requests)
        await idempotency.close()  # what it still computes has no time left, and its readers would wait for it
        server.should_exit = True
        await task
        stop.cancel()
        await generator.close()
