"""Who changes how many workers and routers there are: one module for each way, and the choice between them."""

from __future__ import annotations

from services.monitor.executors.base import Executor
from services.monitor.executors.compose import ComposeExecutor
from services.monitor.executors.kubernetes import KubernetesExecutor
from services.monitor.executors.local import LocalExecutor
from services.monitor.executors.nobody import NobodyExecutor
from services.monitor.utilisation import SERVICES, Service
from shared.bus import Bus
from shared.errors import StartError
from shared.settings import MonitorSettings

__all__ = ["Executor", "choose_executor", "targets"]


def targets(text: str) -> dict[Service, str]:
    """`expert=a,router=b` as a mapping; SCALING_TARGETS has been checked to be of that form."""
    named = dict(part.split("=", 1) for part in text.split(","))
    return {service: named[service] for service in SERVICES if service in named}


def choose_executor(settings: MonitorSettings, bus: Bus) -> Executor:
    """The executor that SCALING_EXECUTOR names.

    Raises:
        StartError: something that it needs is missing.

    """
    kind = settings.scaling_executor
    if kind == "local":
        if settings.scaling_supervisor is None:
            raise StartError("SCALING_EXECUTOR=local needs SCALING_SUPERVISOR, which `openmoe up` sets")
        return LocalExecutor(bus, settings.scaling_supervisor)
    if kind == "compose":
        return ComposeExecutor(targets(settings.scaling_targets), settings.scaling_compose_directory)
    if kind == "kubernetes":
        return KubernetesExecutor(
            targets(settings.scaling_targets), settings.scaling_kubernetes_url, settings.scaling_kubernetes_account
        )
    return NobodyExecutor()
