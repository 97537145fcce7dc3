"""llama.cpp's batched decoding as a peer of bench.generation, through llama-cpp-python's binding of its C API."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
import numpy.typing as npt

from bench.peers import serve

CELLS = 256
"""llama.cpp gives each sequence's KV cache a multiple of so many tokens."""

PROMPTS_UBATCH = 2048
"""Tokens that several prompts compute together: 1.3 times as fast as llama.cpp's default, 512, with 16 streams of the
tiny shape, and as fast with Mixtral's; a single prompt is faster by some percent with the default."""

ERROR_LEVEL = 4
"""GGML_LOG_LEVEL_ERROR of ggml.h. llama-cpp-python 0.3.36 counts in another way: it shows warnings and hides errors."""


def _log(level: int, text: bytes, _: Any) -> None:
    if level == ERROR_LEVEL:
        print(text.decode(errors="replace"), end="", file=sys.stderr, flush=True)


_CALLBACK = lib.llama_log_callback(_log)
"""Kept for as long as llama.cpp may call it."""


class Batch:
    """A llama_batch whose arrays may be written to between two decodes."""

    def __init__(self, tokens: npt.NDArray[np.int32], positions: npt.NDArray[np.int32]) -> None:
        """Take [S, T] tokens and positions of S sequences; the logits of each one's last token are computed."""
        sequences, length = tokens.shape
        self.tokens, self.positions = tokens.reshape(-1), positions.reshape(-1)
        self._ids = np.repeat(np.arange(sequences, dtype=np.int32), length)
        self._counts = np.ones_like(self._ids)
        self._addresses = self._ids.ctypes.data + self._ids.itemsize * np.arange(self._ids.size, dtype=np.uintp)
        self._outputs = np.zeros(self._ids.size, dtype=np.int8)
        self._outputs[length - 1 :: length] = 1
        self.struct = lib.llama_batch(
            n_tokens=self._ids.size,
            token=self._pointer(self.tokens, lib.llama_token),
            embd=None,
            pos=self._pointer(self.positions, lib.llama_pos),
            n_seq_id=self._pointer(self._counts, ctypes.c_int32),
            seq_id=self._pointer(self._addresses, ctypes.POINTER(lib.llama_seq_id)),
            logits=self._pointer(self._outputs, ctypes.c_int8),
        )

    @staticmethod
    def _pointer(array: npt.NDArray[Any], kind: Any) -> Any:
        return array.ctypes.data_as(ctypes.POINTER(kind))


class Model:
    """A GGUF file, loaded."""

    def __init__(self, file: Path, threads: int, *, float32_cache: bool = False) -> None:
        """Load `file`.

        Args:
            file: as bench.gguf_checkpoint writes it.
            threads: that compute.
            float32_cache: keep keys and values as float32, in place of llama.cpp's default, float16.

        """
        lib.llama_log_set(_CALLBACK, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {file}")
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._threads = threads
        self._float32_cache = float32_cache
        self._contexts: dict[tuple[int, int], Any] = {}

    def close(self) -> None:
        for context in self._contexts.values():
            lib.llama_free(context)
        lib.llama_model_free(self._model)

    def _context(self, sequences: int, length: int) -> Any:
        """An empty context for so many sequences of `length` tokens; it is kept for the next that are alike."""
        room = -(-length // CELLS) * CELLS
        if (sequences, room) not in self._contexts:
            params = lib.llama_context_default_params()
            params.n_seq_max = sequences
            params.n_ctx = sequences * room
            params.n_batch = sequences * room
            if sequences > 1:
                params.n_ubatch = PROMPTS_UBATCH
            # Each sequence has a cache of its own, else each token would attend over the others' too, masked.
            params.kv_unified = False
            params.n_threads = params.n_threads_batch = self._threads
            if self._float32_cache:
                params.type_k = params.type_v = lib.GGML_TYPE_F32
            context = lib.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError(f"llama.cpp has no room for {sequences} sequences of {room} tokens")
            self._contexts[sequences, room] = context
        context = self._contexts[sequences, room]
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        return context

    def steps(
        self, prompts: list[list[int]], max_tokens: int
    ) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
        """Generate greedily, all prompts together, `max_tokens` tokens whatever they are.

        Args:
            prompts: S of them, equally long.
            max_tokens: new ones per prompt.

        Yields:
            Each step's logits [S, V], which the next step overwrites, and tokens [S].

        Raises:
            RuntimeError: llama.cpp fails.

        """
        ids = np.array(prompts, dtype=np.int32)
        sequences, length = ids.shape
        context = self._context(sequences, length + max_tokens)
        batch = Batch(ids, np.tile(np.arange(length, dtype=np.int32), (sequences, 1)))
        following = Batch(np.zeros((sequences, 1), dtype=np.int32), np.full((sequences, 1), length, dtype=np.int32))
        for step in range(max_tokens):
            status = lib.llama_decode(context, batch.struct)
            if status:
                raise RuntimeError(f"llama_decode returns {status}")
            logits = np.ctypeslib.as_array(lib.llama_get_logits(context), shape=(sequences, self._vocab_size))
            tokens = logits.argmax(axis=1)
            yield logits, tokens
            batch = following
            batch.tokens[:] = tokens
            batch.positions[:] = length + step

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """The new tokens of each prompt."""
        columns: list[list[int]] = np.stack([tokens for _, tokens in self.steps(prompts, max_tokens)], axis=1).tolist()
        return columns


def main() -> None:
    file, threads = Path(sys.argv[1]), int(sys.argv[2])
    serve(Model(file, threads).generate)


if __name__ == "__main__":
    main()
