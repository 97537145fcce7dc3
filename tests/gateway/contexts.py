"""A gateway's context, with real parts, without its HTTP server."""

from __future__ import annotations

import os
from typing import Any

from services.gateway.admission import Admission
from services.gateway.answers import Answers
from services.gateway.context import Context
from services.gateway.forwards import Forwards
from services.gateway.generation import Generator, Observations
from services.gateway.idempotency import Idempotency
from services.gateway.text import TextTokenizer
from shared.bus import Bus
from shared.checkpoint import Checkpoint
from shared.replicas import Replicas
from shared.settings import DEMO_MODEL, GatewaySettings
from shared.status import Fleet


def context(bus: Bus, fleet: Fleet, **changes: Any) -> Context:
    """The context of a gateway of the demo model with these settings; its deployment is nobody else's on the bus."""
    settings = GatewaySettings(**{"model": DEMO_MODEL, "timeout_seconds": 5.0, **changes})
    checkpoint = Checkpoint.open(settings.model)
    deployment = checkpoint.deployment(f"{settings.model_name}-{os.urandom(4).hex()}")
    tokenizer = TextTokenizer.open(settings.model)
    admission = Admission(
        settings.max_concurrent_requests,
        settings.max_queued_requests,
        settings.timeout_seconds,
        settings.max_queue_seconds,
    )
    observations = Observations(settings.model_name)
    answers = Answers.open(settings, deployment)
    routers = Replicas("router", deployment)
    generator = Generator(
        bus, deployment, tokenizer, admission, observations, answers, routers, settings.timeout_seconds
    )
    return Context(
        settings,
        checkpoint.config,
        deployment,
        bus.instance,
        bus,
        fleet,
        tokenizer,
        admission,
        observations,
        answers,
        generator,
        Forwards(bus, deployment, checkpoint.config, routers, settings),
        Idempotency.open(settings, deployment),
    )
