"""The files of a deployment, without running it: what they name exists, and Prometheus' own tool accepts them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shared.instrumentation import REGISTRY

ROOT = Path(__file__).resolve().parent.parent.parent
DEPLOY = ROOT / "deploy"
COMPOSE = (ROOT / "docker-compose.yml").read_text()
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RULES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")


def exported() -> set[str]:
    """Every name under which a metric of ours may be asked for."""
    names = set()
    for family in REGISTRY.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


@pytest.mark.parametrize("path", [*DASHBOARDS, *RULES], ids=lambda path: path.name)
def test_every_metric_that_is_asked_for_is_exported(path: Path) -> None:
    known = exported()
    assert "moe_generation_tokens_total" in known
    asked = set(re.findall(r"(?<![:\w])moe_\w+", path.read_text()))
    assert asked <= known, f"unknown: {sorted(asked - known)}"


def test_every_recorded_series_that_is_asked_for_is_recorded() -> None:
    recorded = set(re.findall(r"record: (\S+)", "".join(path.read_text() for path in RULES)))
    asked = set(re.findall(r"\b(?:model|layer|expert|http):moe_[\w:]+", "".join(p.read_text() for p in DASHBOARDS)))
    assert asked
    assert asked <= recorded


def test_dashboards_are_told_apart_and_have_the_provisioned_data_source() -> None:
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert {path.stem for path in DASHBOARDS} == {"overview", "latency", "experts", "bus"}
    assert len({board["uid"] for board in boards}) == len(boards)
    provisioned = (DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    for board in boards:
        for panel in board["panels"]:
            assert f"uid: {panel['datasource']['uid']}\n" in provisioned
            assert panel["targets"], panel["title"]


def test_every_image_has_a_version() -> None:
    images = re.findall(r"image: (\S+)", COMPOSE)
    assert len(images) >= 6
    for image in images:
        assert re.search(r":(\$\{OPENMOE_TAG|v?\d)", image), f"{image} may become another one tomorrow"
        assert "latest" not in image


def test_every_setting_that_compose_passes_is_one() -> None:
    from services.config_table import rows

    known = {row.name for row in rows()}
    block = COMPOSE[COMPOSE.index("x-environment:") : COMPOSE.index("\nservices:")]
    passed = set(re.findall(r"^ +([A-Z_]+):", block, re.MULTILINE))
    assert len(passed) > 8
    assert passed <= known


def test_the_stop_periods_are_longer_than_the_services_own() -> None:
    """A container that Docker kills before its service has finished draining loses requests."""
    grace = re.search(r"GRACE_SECONDS: \$\{GRACE_SECONDS:-(\d+)\}", COMPOSE)
    periods = re.findall(r"stop_grace_period: (\d+)s", COMPOSE[: COMPOSE.index("\nservices:")])
    assert grace
    assert [int(period) > int(grace[1]) for period in periods] == [True]


@needs_promtool
def test_prometheus_accepts_the_configuration_and_the_rules_do_what_their_tests_say() -> None:
    for line in (["check", "config", "prometheus.yml"], ["test", "rules", "tests/alerts.yml"]):
        done = subprocess.run(
            ["promtool", *line], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_what_to_do_and_has_a_rule_test() -> None:
    alerts = (DEPLOY / "prometheus" / "rules" / "alerts.yml").read_text()
    tests = (DEPLOY / "prometheus" / "tests" / "alerts.yml").read_text()
    names = re.findall(r"alert: (\w+)", alerts)
    assert len(names) == alerts.count("summary:") == alerts.count("description:")
    assert {name for name in names if f"alertname: {name}\n" not in tests} == set()
