"""mosec as a peer of bench.forward: one MoE layer in torch behind its dynamic batching.

`python -m bench.mosec_peer --port P`; PeerSettings come from the environment, which mosec's worker processes inherit.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from mosec import Server, Worker
from safetensors.torch import load_file

VARIABLE = "BENCH_PEER"
TOP_K = 2
Row = npt.NDArray[np.float32]


class PeerSettings(msgspec.Struct, frozen=True):
    folder: str
    """A Mixtral checkpoint of one layer."""
    media_type: str
    workers: int
    threads: int
    """Torch's, in each worker."""
    batch: int
    wait_ms: int
    packed: bool
    """Weights laid out for oneDNN, or plain F.linear."""

    def environment(self) -> dict[str, str]:
        return {VARIABLE: msgspec.json.encode(self).decode()}

    @classmethod
    def from_environment(cls) -> Self:
        return msgspec.json.decode(os.environ[VARIABLE], type=cls)


class Layer:
    """Mixtral's sparse MoE block (arXiv 2401.04088) in float32."""

    def __init__(self, folder: Path, *, packed: bool) -> None:
        tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        block = "model.layers.0.block_sparse_moe."
        self._gate = tensors[f"{block}gate.weight"]  # [E, H]
        self._packed = packed
        self._experts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for expert in range(self._gate.shape[0]):
            gate, up, down = (tensors[f"{block}experts.{expert}.{name}.weight"] for name in ("w1", "w3", "w2"))
            self._experts.append((self._prepared(torch.cat([gate, up])), self._prepared(down)))  # [2I, H], [H, I]

    def _prepared(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight  # noqa: SLF001

    def _linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not self._packed:
            return F.linear(x, weight)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # noqa: SLF001
        return y

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] to [T, H]."""
        weights, index = torch.topk(F.softmax(F.linear(x, self._gate), dim=-1), TOP_K, dim=-1)  # [T, k]
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for expert, (gate_up, down) in enumerate(self._experts):
            rows, slot = torch.where(index == expert)
            if rows.numel():
                gate, up = self._linear(x[rows], gate_up).chunk(2, dim=-1)
                out.index_add_(0, rows, self._linear(F.silu(gate) * up, down) * weights[rows, slot].unsqueeze(1))
        return out


class LayerWorker(Worker):  # type: ignore[misc]
    """Rows in, rows out; the batch is mosec's."""

    def __init__(self) -> None:
        super().__init__()
        settings = PeerSettings.from_environment()
        torch.set_num_threads(settings.threads)
        self._layer = Layer(Path(settings.folder), packed=settings.packed)
        self._raw = settings.media_type == "application/octet-stream"
        self.resp_mime_type = settings.media_type

    def deserialize(self, data: bytes) -> Row:
        return np.frombuffer(data if self._raw else msgspec.msgpack.decode(data)["hidden_states"][2], dtype="<f4")

    def serialize(self, data: Row) -> bytes:
        if self._raw:
            return data.tobytes()
        return msgspec.msgpack.encode({"layer": 0, "hidden_states": ["float32", [1, data.size], data.tobytes()]})

    def forward(self, data: list[Row] | Row) -> list[Row] | Row:
        rows = data if isinstance(data, list) else [data]
        with torch.inference_mode():
            out = self._layer(torch.from_numpy(np.stack(rows))).numpy()
        return list(out) if isinstance(data, list) else out[0]


def main() -> None:
    settings = PeerSettings.from_environment()
    server = Server()
    server.append_worker(
        LayerWorker,
        num=settings.workers,
        max_batch_size=settings.batch,
        max_wait_time=settings.wait_ms,
    )
    server.run()


if __name__ == "__main__":
    main()
