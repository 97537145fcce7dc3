"""`python -m services.probe`: exit code 0 if this container's service is ready; runs often, so it imports little."""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_SECONDS = 4


def main() -> int:
    port = int(os.environ.get("METRICS_PORT") or 0)
    if not port:
        sys.stderr.write("error: METRICS_PORT must be set for the probe to find the service\n")
        return 2
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        sys.stdout.write(answer.read().decode(errors="replace"))
    except OSError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    finally:
        connection.close()
    return 0 if answer.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
