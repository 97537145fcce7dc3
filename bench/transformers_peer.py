"""transformers' `generate` as a peer of bench.generation."""

from __future__ import annotations

import sys
from typing import Any

import torch

from bench.peers import serve


def load(path: str, threads: int, experts: str) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, experts_implementation=experts).eval()


def main() -> None:
    path, threads, experts = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    model = load(path, threads, experts)

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=max_tokens,
                max_new_tokens=max_tokens,
                do_sample=False,
            )
        new: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return new

    serve(generate)


if __name__ == "__main__":
    main()
