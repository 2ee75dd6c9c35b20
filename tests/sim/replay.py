"""Runs seeds of the simulator by hand: `python -m tests.sim.replay --seed 7`, or many: `--seeds 100 --from 1`."""

from __future__ import annotations

import argparse
import time

from tests.sim.cluster import Cluster
from tests.sim.profiles import PROFILES


def main() -> None:
    """Prints a line per seed and stops at the first that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--from", type=int, default=1, dest="first")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--models", type=int, default=6)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--profile", choices=PROFILES, default="everything")
    options = parser.parse_args()
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    for seed in seeds:
        begun = time.process_time()
        cluster = Cluster(
            seed,
            nodes=options.nodes,
            models=options.models,
            faults=PROFILES[options.profile],
            requests=options.requests,
        )
        cluster.run()
        print(f"seed {seed}: {cluster.summary()} in {time.process_time() - begun:.1f} CPU s")


if __name__ == "__main__":
    main()
