"""Many simulated runs, or one again: `python -m tests.simulation.run --runs 10000`, `... --seed 7 --trace`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter

from tests.simulation.plan import make_plan
from tests.simulation.world import Report, simulate

PROGRESS_SECONDS = 10.0


def replay(seed: int) -> str:
    return f"python -m tests.simulation.run --seed {seed} --trace"


def describe(report: Report) -> str:
    """Why a run failed, and how to see it again."""
    more = f"\n  and {len(report.violations) - 3} more" if len(report.violations) > 3 else ""
    shown = "\n  ".join(text.rstrip() for text in report.violations[:3])
    return f"seed {report.seed} fails:\n  {shown}{more}\n  replay: {replay(report.seed)}"


def one(seed: int, *, trace: bool) -> int:
    """Run a seed and print its plan, what happened if asked, and what came of it."""
    plan = make_plan(seed)
    print(plan)
    report = simulate(seed, trace=trace)
    for line in report.trace:
        print(line)
    print(f"outcomes {report.outcomes}")
    print(f"counts {dict(sorted(report.counts.items()))}")
    print(f"{report.seconds - 1000:.1f} simulated seconds, digest {report.digest:08x}")
    if report.violations:
        print(describe(report))
    return 1 if report.violations else 0


def many(first: int, runs: int, workers: int) -> int:
    """Run seeds `first`, `first` + 1, …; print the failing ones as they come, and at the end what was met."""
    start = shown = time.monotonic()
    counts: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    failed: list[int] = []
    seconds = 0.0
    seeds = range(first, first + runs)
    pool = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else None
    try:
        reports = map(simulate, seeds) if pool is None else pool.imap_unordered(simulate, seeds, chunksize=8)
        for done, report in enumerate(reports, start=1):
            counts += report.counts
            outcomes.update(report.outcomes.values())
            seconds += report.seconds - 1000
            if report.violations:
                failed.append(report.seed)
                print(describe(report), flush=True)
            now = time.monotonic()
            if now - shown > PROGRESS_SECONDS:
                shown = now
                print(f"{done} of {runs} runs, {done / (now - start):.1f}/s, {len(failed)} failed", flush=True)
    finally:
        if pool is not None:
            pool.terminate()
            pool.join()
    took = time.monotonic() - start
    print(f"{runs} runs from seed {first}: {len(failed)} failed; {took:.0f} s, {runs / took:.1f} runs/s", end="")
    print(f", {seconds:.0f} simulated seconds")
    for title, found in (("requests", outcomes), ("met", counts)):
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in sorted(found.items())))
    for seed in sorted(failed)[:20]:
        print(f"failed: {replay(seed)}")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.run", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="how many seeds (default: 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--seed", type=int, help="run this seed alone, and say what it stands for")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every message, log line and fault")
    options = parser.parse_args()
    if options.seed is not None:
        return one(options.seed, trace=options.trace)
    return many(options.first, options.runs, options.workers)


if __name__ == "__main__":
    sys.exit(main())
