"""A notification as Alertmanager's webhook JSON, version 4, so that whatever takes Alertmanager's takes ours.

https://prometheus.io/docs/alerting/latest/configuration/#webhook_config
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Literal

from services.monitor.alerts import Group, Notification, fingerprint
from services.monitor.messages import OpenAlert
from services.monitor.rules import RULES

NEVER = "0001-01-01T00:00:00Z"
"""Where Alertmanager has no time yet."""
GROUP_LABELS = ("alertname", "deployment", "service")
RECEIVER = "openmoe"


def group_labels(group: Group) -> dict[str, str]:
    return {name: value for name, value in zip(GROUP_LABELS, group, strict=True) if value}


def group_key(group: Group) -> str:
    """What names the group in all of its notifications, in Alertmanager's form."""
    inside = ", ".join(f"{name}={json.dumps(value)}" for name, value in group_labels(group).items())
    return f"{{}}:{{{inside}}}"


def webhook_json(notification: Notification, url: str) -> dict[str, Any]:
    """The body of one POST.

    Args:
        notification: of one group.
        url: of the monitor that says it, for people.

    """
    alerts = [_alert(each, "firing", notification.time, url) for each in notification.firing]
    alerts += [_alert(each, "resolved", notification.time, url) for each in notification.resolved]
    return {
        "version": "4",
        "groupKey": group_key(notification.group),
        "truncatedAlerts": 0,
        "status": "firing" if notification.firing else "resolved",
        "receiver": RECEIVER,
        "groupLabels": group_labels(notification.group),
        "commonLabels": _common([alert["labels"] for alert in alerts]),
        "commonAnnotations": _common([alert["annotations"] for alert in alerts]),
        "externalURL": url,
        "alerts": alerts,
    }


def _alert(each: OpenAlert, status: Literal["firing", "resolved"], now: float, url: str) -> dict[str, Any]:
    labels = {
        "alertname": each.kind,
        "severity": each.severity,
        "action": each.action,
        "subject": each.subject,
        "deployment": each.deployment,
        "service": each.service,
        "instance": each.instance,
    }
    annotations = {
        "summary": f"{RULES[each.kind].summary}: {each.subject}",
        "description": f"{each.text}. {each.advice}" if status == "firing" else each.text,
        "value": "" if each.value is None else f"{each.value:g}",
        "threshold": "" if each.threshold is None else f"{each.threshold:g}",
    }
    return {
        "status": status,
        "labels": {name: value for name, value in labels.items() if value},
        "annotations": {name: value for name, value in annotations.items() if value},
        "startsAt": when(each.started),
        "endsAt": when(now) if status == "resolved" else NEVER,
        "generatorURL": url,
        "fingerprint": fingerprint(each),
    }


def _common(maps: list[dict[str, str]]) -> dict[str, str]:
    return {name: value for name, value in maps[0].items() if all(each.get(name) == value for each in maps)}


def when(seconds: float) -> str:
    """Unix seconds in RFC 3339's form, in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
