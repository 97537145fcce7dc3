"""transformers' `generate` as a peer of bench.generation: reads one request per line, answers with its seconds."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch


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
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = torch.tensor(request["prompts"])
        tokens = request["max_tokens"]
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
            )
        seconds = time.perf_counter() - start
        assert out.shape[1] == prompts.shape[1] + tokens  # noqa: S101 - else the figure would be of something else
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
