"""Every setting of every service: its name, default, meaning, and who reads it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo
from rich.table import Table

from shared.errors import StartError
from shared.settings import (
    SECRETS,
    ExpertSettings,
    GatewaySettings,
    MonitorSettings,
    RouterSettings,
    ServiceSettings,
    load,
)

SERVICES: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "router": RouterSettings,
    "expert": ExpertSettings,
    "monitor": MonitorSettings,
}


@dataclass(frozen=True)
class Row:
    """One setting."""

    name: str
    default: str
    services: str
    meaning: str


def rows() -> list[Row]:
    """All settings, those of every service first."""
    readers: dict[str, list[str]] = {}
    fields: dict[str, FieldInfo] = {}
    for service, kind in SERVICES.items():
        for name, field in kind.model_fields.items():
            readers.setdefault(name, []).append(service)
            fields.setdefault(name, field)
    result = []
    for name, field in fields.items():
        default = "models/demo" if name == "model" else "" if field.default is None else f"{field.default}"
        who = "all" if len(readers[name]) == len(SERVICES) else ", ".join(readers[name])
        result.append(Row(name.upper(), default, who, field.description or ""))
    return result


def markdown() -> str:
    """The table of the README."""
    lines = ["| variable | default | read by | meaning |", "|---|---|---|---|"]
    lines += [f"| `{r.name}` | {f'`{r.default}`' if r.default else ''} | {r.services} | {r.meaning} |" for r in rows()]
    return "\n".join(lines) + "\n"


def table() -> Table:
    """The settings as this environment makes them, checked.

    Raises:
        StartError: one line naming each wrong variable.

    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for kind in SERVICES.values():
        try:
            values |= dict(load(kind))
        except StartError as error:
            problems += [p for p in str(error).split("; ") if p not in problems]
    if problems:
        raise StartError("; ".join(problems))
    result = Table("variable", "value", "read by", "meaning")
    for row in rows():
        value = values[row.name.lower()]
        shown = "" if value is None else "(hidden)" if row.name in SECRETS else str(value)
        is_set = bool(os.environ.get(row.name) or os.environ.get(f"{row.name}_FILE"))
        result.add_row(row.name, f"[bold]{shown}[/bold]" if is_set else shown, row.services, row.meaning)
    return result
