"""Runs seeds of the simulator by hand: `python -m tests.sim.replay --seed 7`, or many: `--seeds 100 --from 1`."""

from __future__ import annotations

import argparse
import time

from tests.sim.cluster import Cluster
from tests.sim.profiles import PROFILES


def main() -> None:
    """Prints a line per seed and stops at the first that fails, unless told to go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--from", type=int, default=1, dest="first")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--models", type=int, default=6)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--profile", choices=PROFILES, default="everything")
    parser.add_argument("--story", action="store_true", help="print every line of the run as it happens")
    parser.add_argument("--go-on", action="store_true", help="print what failed in a line, and go on")
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
        cluster.world.is_told = options.story
        try:
            cluster.run()
        except AssertionError as error:
            if not options.go_on:
                raise
            print(f"seed {seed} FAILED: {str(error).partition('replay:')[0][:1500]}")
            continue
        print(f"seed {seed}: {cluster.summary()} in {time.process_time() - begun:.1f} CPU s")


if __name__ == "__main__":
    main()
