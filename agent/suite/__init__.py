"""The suite: recipes, executors and the orchestrator of the HPC benchmark toolkit, on Herder's load generator.

It needs no head: `herder executor` on the client nodes, `herder orchestrate` anywhere, `herder suite` for recipes and
Slurm. `agent.suite.api` is the face for Python programs.
"""
