"""Settings from the environment: one line that names each wrong variable, secrets from files, no secret in an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import StartError
from shared.settings import (
    DEMO_MODEL,
    SECRETS,
    ExpertSettings,
    GatewaySettings,
    MonitorSettings,
    RouterSettings,
    ServiceSettings,
    load,
    refuse,
)

KINDS = (ExpertSettings, GatewaySettings, MonitorSettings, RouterSettings)
SECRET = "correct-horse-battery"


@pytest.fixture(autouse=True)
def _no_settings_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS:
        for name in kind.model_fields:
            monkeypatch.delenv(name.upper(), raising=False)
    for name in SECRETS:
        monkeypatch.delenv(f"{name}_FILE", raising=False)


def refusal(kind: type[ServiceSettings]) -> str:
    with pytest.raises(StartError) as caught:
        load(kind)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_environment_everything_has_a_default(kind: type[ServiceSettings]) -> None:
    settings = load(kind)
    assert settings.model == DEMO_MODEL
    assert settings.model_name == "demo"
    assert settings.env == "development"


def test_values_are_read_and_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"NATS_URL": "nats://bus:4222", "EXPERT_SHARDS": "4", "SHARDS": "3,1,3", "TIMEOUT_SECONDS": "2.5"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    settings = load(ExpertSettings)
    assert (settings.nats_url, settings.expert_shards, settings.timeout_seconds) == ("nats://bus:4222", 4, 2.5)
    assert settings.pinned_shards == (1, 3)


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_SHARDS", "")
    monkeypatch.setenv("SHARDS", "")
    settings = load(ExpertSettings)
    assert (settings.expert_shards, settings.pinned_shards) == (2, ())


def test_settings_cannot_be_changed() -> None:
    settings = load(RouterSettings)
    with pytest.raises(ValueError, match="frozen"):
        settings.batch_size = 3


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (GatewaySettings, "PORT", "http"),
        (GatewaySettings, "PORT", "65536"),
        (GatewaySettings, "MAX_BODY_MB", "0"),
        (RouterSettings, "BATCH_SIZE", "1.5"),
        (RouterSettings, "KV_CACHE_MB", "-1"),
        (RouterSettings, "DTYPE", "float64"),
        (RouterSettings, "DEVICE", "tpu"),
        (RouterSettings, "INSTANCE", "router 1"),
        (RouterSettings, "INSTANCE", "router\r\nPUB x 0"),
        (ExpertSettings, "SHARDS", "0;1"),
        (ExpertSettings, "EXPERT_SHARDS", "0"),
        (MonitorSettings, "ENV", "prod"),
        (MonitorSettings, "LOG_LEVEL", "loud"),
        (MonitorSettings, "TIMEOUT_SECONDS", "nan"),
        (MonitorSettings, "ALERT_LATENCY", "prefill"),
        (MonitorSettings, "ALERT_ERROR_RATE", "5"),
    ],
)
def test_one_wrong_value_gives_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, kind: type[ServiceSettings], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    text = refusal(kind)
    assert text.startswith(f"{name}={value!r}: ")


def test_every_wrong_value_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_SIZE", "many")
    monkeypatch.setenv("MAX_WAITING", "few")
    text = refusal(RouterSettings)
    assert "BATCH_SIZE='many'" in text
    assert "MAX_WAITING='few'" in text


def test_a_shard_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS", "0,2")
    assert refusal(ExpertSettings) == "SHARDS=0,2 names a shard that EXPERT_SHARDS=2 has not"


def test_production_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENV", "production")
    assert refusal(GatewaySettings) == "API_AUTH_TOKEN must be set when ENV=production"
    monkeypatch.setenv("API_AUTH_TOKEN", SECRET)
    assert load(GatewaySettings).api_auth_token == SECRET


def test_a_secret_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n", encoding="utf-8")
    monkeypatch.setenv("ENV", "production")
    monkeypatch.setenv("API_AUTH_TOKEN_FILE", str(file))
    assert load(GatewaySettings).api_auth_token == SECRET
    assert load(RouterSettings).env == "production", "who has no such setting does not mind"


def test_the_variable_itself_comes_before_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("API_AUTH_TOKEN", SECRET)
    monkeypatch.setenv("API_AUTH_TOKEN_FILE", str(tmp_path / "missing"))
    assert load(GatewaySettings).api_auth_token == SECRET


def test_a_secrets_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "missing", tmp_path, binary):
        monkeypatch.setenv("API_AUTH_TOKEN_FILE", str(file))
        assert refusal(GatewaySettings).startswith(f"API_AUTH_TOKEN_FILE={file}: ")


def test_a_wrong_secret_is_named_but_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("API_AUTH_TOKEN", "hunter2")
    text = refusal(GatewaySettings)
    assert text.startswith("API_AUTH_TOKEN=")
    assert "(hidden)" in text
    assert "hunter2" not in text
    monkeypatch.delenv("API_AUTH_TOKEN")
    file = tmp_path / "token"
    file.write_text("hunter2", encoding="utf-8")
    monkeypatch.setenv("API_AUTH_TOKEN_FILE", str(file))
    assert "hunter2" not in refusal(GatewaySettings)


@pytest.mark.parametrize("url", ["hooks.example", "ftp://h/x", "http:///", "http://h:port/", "http://h:99999/"])
def test_a_webhook_that_is_no_http_url_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("ALERT_WEBHOOK_URL", f"{url}{SECRET}")
    text = refusal(MonitorSettings)
    assert text.startswith("ALERT_WEBHOOK_URL='(hidden)': must be of the form http://")
    assert SECRET not in text


def test_a_webhook_may_come_from_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text(f"https://hooks.example/{SECRET}\n", encoding="utf-8")
    monkeypatch.setenv("ALERT_WEBHOOK_URL_FILE", str(file))
    assert load(MonitorSettings).alert_webhook_url == f"https://hooks.example/{SECRET}"


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("ALERT_LATENCY_CLEAR_MS", "501", "at most ALERT_LATENCY_MS=500"),
        ("ALERT_ERROR_RATE_CLEAR", "0.06", "at most ALERT_ERROR_RATE=0.05"),
        ("ALERT_CACHE_HIT_RATE_CLEAR", "0.5", "at least ALERT_CACHE_HIT_RATE=0.6"),
        ("ALERT_MEMORY_CLEAR", "0.95", "at most ALERT_MEMORY=0.9"),
        ("ALERT_IMBALANCE_CLEAR", "3", "at most ALERT_IMBALANCE=2"),
        ("ALERT_QUEUE_CLEAR", "0.9", "at most ALERT_QUEUE=0.8"),
    ],
)
def test_an_alert_clears_on_the_good_side_of_where_it_fires(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, other: str
) -> None:
    monkeypatch.setenv(name, value)
    assert refusal(MonitorSettings) == f"{name}={value} must be {other}"


def test_a_home_that_nobody_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "~nobody-of-this-name/model")
    assert refusal(RouterSettings).startswith("MODEL=")


def test_refuse_ends_the_process_with_the_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        refuse(StartError("PORT='x': not a number"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: PORT='x': not a number\n"
