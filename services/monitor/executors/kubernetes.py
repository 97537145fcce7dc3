"""SCALING_EXECUTOR=kubernetes: the scale subresource of Deployments, by the API and the pod's service account.

https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/deployment-v1/ says what is asked. The account
needs `get` and `patch` on `deployments/scale` of its namespace. Pods that go get SIGTERM and their grace period.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from services.monitor.executors.base import failed, not_named
from services.monitor.utilisation import Service

CALL_SECONDS = 10.0
ATTEMPTS = 4
"""Of each call: somebody else may write at the same time, the token may just have been renewed, the API may restart."""
FIRST_PAUSE_SECONDS = 0.2
AGAIN = {401, 409, 429, 500, 502, 503, 504}
HINTS = {
    401: "the token is not accepted; see SCALING_KUBERNETES_ACCOUNT",
    403: "the service account needs get and patch on deployments/scale",
    404: "there is no such Deployment; see SCALING_TARGETS",
    409: "somebody else keeps changing it",
}


class KubernetesExecutor:
    """Patches `spec.replicas`."""

    acts = True

    def __init__(self, targets: Mapping[Service, str], url: str, account: Path) -> None:
        """Scale `targets`, the names of Deployments.

        Args:
            targets: by service.
            url: the API's.
            account: folder with `token`, `namespace` and, for https, `ca.crt`.

        """
        self._targets = targets
        self._url = url.rstrip("/")
        self._account = account
        self._client: httpx.AsyncClient | None = None

    async def counts(self) -> dict[Service, int]:
        return {service: await self._replicas("GET", name) for service, name in self._targets.items()}

    async def scale(self, service: Service, count: int, reason: str) -> str:
        del reason
        name = self._targets.get(service)
        if name is None:
            raise not_named(service)
        replicas = await self._replicas("PATCH", name, {"spec": {"replicas": count}})
        return f"Deployment {name} has spec.replicas {replicas}"

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def _open(self) -> httpx.AsyncClient:
        if self._client is None:
            verify: ssl.SSLContext | bool = True
            if self._url.startswith("https://"):
                try:
                    verify = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
                except OSError as error:
                    raise failed(f"{self._account / 'ca.crt'}: {error.strerror}") from None
            self._client = httpx.AsyncClient(timeout=CALL_SECONDS, trust_env=False, verify=verify)
        return self._client

    def _read(self, name: str) -> str:
        """A file of the account, anew each time: kubelet renews the token."""
        try:
            return (self._account / name).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise failed(f"{self._account / name} cannot be read: {error}") from None

    async def _replicas(self, method: str, name: str, patch: dict[str, Any] | None = None) -> int:
        """`spec.replicas` of the Deployment's scale, as the API answers it.

        Raises:
            MoeError: `scaling_failed`, with what is to be done about it.

        """
        client = self._open()
        path = f"/apis/apps/v1/namespaces/{self._read('namespace')}/deployments/{name}/scale"
        problem, pause = "", FIRST_PAUSE_SECONDS
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(pause)
                pause *= 2
            headers = {"Authorization": f"Bearer {self._read('token')}", "Accept": "application/json"}
            if patch is not None:
                headers["Content-Type"] = "application/merge-patch+json"
            try:
                answer = await client.request(method, self._url + path, headers=headers, json=patch)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
                continue
            if answer.status_code == 200:
                return _spec_replicas(answer)
            hint = HINTS.get(answer.status_code)
            problem = f"HTTP {answer.status_code}" + (f", {hint}" if hint else "")
            if answer.status_code not in AGAIN:
                break
        raise failed(f"Kubernetes: {method} {path}: {problem}")


def _spec_replicas(answer: httpx.Response) -> int:
    try:
        return int(answer.json()["spec"].get("replicas", 0))  # the API leaves zeros out
    except (ValueError, TypeError, KeyError, AttributeError):
        raise failed("Kubernetes answered 200 with something that is no Scale; see SCALING_KUBERNETES_URL") from None
