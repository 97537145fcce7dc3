"""Every message type of the tree, and the documents that must agree on them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from shared import status
from shared.wire import Message
from tests.protocol.make_vectors import FILE

ROOT = Path(__file__).resolve().parent.parent.parent
PROTOCOL = ROOT / "docs" / "protocol.md"
VECTORS: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))


def _kinds() -> dict[str, type[Message]]:
    modules = [
        importlib.import_module(f"services.{f.parent.name}.messages") for f in ROOT.glob("services/*/messages.py")
    ]
    found = (value for module in [*modules, status] for value in vars(module).values())
    return {c.__name__: c for c in found if isinstance(c, type) and issubclass(c, Message) and c is not Message}


KINDS = _kinds()
