"""Hugging Face checkpoint folders, as they are published: configuration, tensors by name, fingerprint. Torch-free."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from shared import subjects
from shared.checkpoint.config import ModelConfig, parse_config
from shared.checkpoint.index import TensorIndex
from shared.errors import CheckpointError

__all__ = ["Checkpoint", "ModelConfig"]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: if there is none.

    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value


@dataclass(frozen=True)
class Checkpoint:
    """One opened checkpoint folder; every file is present and whole, no tensor has been read."""

    path: Path
    config: ModelConfig
    tensors: TensorIndex
    fingerprint: str
    """Hex digest of the configuration, the tokenizer, and samples of every tensor."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the folder `path`.

        Raises:
            CheckpointError: no such folder, an unsupported family or switch, a missing, truncated or damaged file.

        """
        if not path.is_dir():
            raise CheckpointError(f"MODEL={path}: no such folder; it must be a Hugging Face checkpoint's folder")
        raw = read_json(path / "config.json")
        generation = read_json(path / "generation_config.json") if (path / "generation_config.json").exists() else {}
        config = parse_config(raw, generation, where=str(path / "config.json"))
        tensors = TensorIndex.open(path)
        digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode())
        tokenizer = path / "tokenizer.json"
        if tokenizer.exists():
            digest.update(tokenizer.read_bytes())
        tensors.sample_into(digest)
        return cls(path, config, tensors, digest.hexdigest())

    def deployment(self, model_name: str) -> str:
        """The deployment's name on the bus: two versions of a model never share one."""
        return subjects.deployment(model_name, self.fingerprint)
