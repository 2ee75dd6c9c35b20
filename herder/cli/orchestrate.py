"""`herder orchestrate`: runs a suite against servers and executors that are there. Needs no head."""

from __future__ import annotations

from typing import Any

import click

from herder.cli import output
from herder.cli.command import Globals, HerderCommand, pass_globals

EXAMPLES = (
    "herder orchestrate --server-nodes mel2001 mel2002 --client-nodes mel2003 mel2004 \\",
    "    --workload-config-file recipes/ollama.yaml --server-port 11434 --client-port 6000",
    "herder orchestrate --server-nodes gpu1 --client-nodes cpu1 --workload-config-file vllm.yaml \\",
    "    --server-port 8000 --enable-monitoring --pushgateway-node mel2109 --monitor-interval 2",
)
SEVERAL = ("--server-nodes", "--client-nodes")


class SeveralValues(HerderCommand):
    """Takes several values after one flag, as the toolkit's argparse did: `--server-nodes a b c`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeats the flag before each further value; what begins with a dash ends the list."""
        spread: list[str] = []
        flag = ""
        is_first = False
        for word in args:
            name = word.partition("=")[0]
            if word.startswith("-"):
                flag, is_first = (name if name in SEVERAL else ""), "=" not in word
                spread.append(word)
            elif flag and not is_first:
                spread += [flag, word]
            else:
                is_first = False
                spread.append(word)
        return super().parse_args(ctx, spread)


@click.command("orchestrate", cls=SeveralValues, examples=EXAMPLES)
@click.option("--server-nodes", multiple=True, required=True, metavar="NODE...", help="Hosts that serve.")
@click.option("--client-nodes", multiple=True, required=True, metavar="NODE...", help="Hosts with an executor.")
@click.option("--workload-config-file", required=True, type=click.Path(), help="The recipe, YAML or JSON.")
@click.option("--server-port", type=click.IntRange(1, 65_535), default=11434, help="Default 11434.")
@click.option("--client-port", type=click.IntRange(1, 65_535), default=5000, help="Default 5000.")
@click.option("--timeout", type=click.FloatRange(min=1), default=600.0, help="Of each step in seconds; default 600.")
@click.option("--enable-monitoring", is_flag=True, help="Sample this machine while the suite runs.")
@click.option("--pushgateway-node", help="Where samples are pushed to; needed with --enable-monitoring.")
@click.option("--monitor-interval", type=click.FloatRange(min=0.05), default=5.0, help="In seconds; default 5.")
@click.option("--monitor-output", type=click.Path(), default="benchmark_metrics.csv", help="The samples' file.")
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="A module that registers services.")
@pass_globals
def command(options: Globals, /, **given: Any) -> int:
    """Run every benchmark of a recipe: servers healthy, model there, clients started, results written.

    Results go to OUTPUT_DIR, else the recipe's output_directory, else ./benchmark_output. Ends with 1 and a code E001
    to E008 when a step fails, and with 1 when a client died on the way and what was measured is degraded.
    """
    from agent.suite.errors import SuiteError
    from agent.suite.orchestrator import Interrupted, Orchestrator

    orchestrator = Orchestrator(
        list(given["server_nodes"]),
        list(given["client_nodes"]),
        given["workload_config_file"],
        given["server_port"],
        given["client_port"],
        given["timeout"],
        enable_monitoring=given["enable_monitoring"],
        pushgateway_node=given["pushgateway_node"],
        monitor_interval=given["monitor_interval"],
        monitor_output=given["monitor_output"],
        plugins=given["plugins"],
        say=lambda text: output.note(options, text),
    )
    try:
        summary = orchestrator.run()
    except SuiteError as error:
        output.show_error(error.code, str(error), error.hint)
        return output.EXIT_FAILED
    except Interrupted:
        output.note(options, "interrupted: the clients were stopped")
        return output.EXIT_INTERRUPTED
    output.emit(options, summary, _table(summary))
    return output.EXIT_FAILED if summary["is_degraded"] else output.EXIT_OK


def _table(summary: dict[str, Any]) -> str:
    from herder.cli.table import Column, render

    names = ("BENCHMARK", "RUN", "REQUESTS", "ERRORS", "REQ/S", "P50 S", "P99 S", "COVERS")
    columns = [Column(name, is_number=name not in ("BENCHMARK", "COVERS")) for name in names]
    rows = []
    for run in summary["benchmarks"]:
        found = run.get("metrics") or {}
        figures = [f"{found.get(name, 0.0):.4g}" for name in ("throughput_rps", "p50_latency", "p99_latency")]
        rows.append(
            [run["benchmark_name"], str(run["repetition"]), str(found.get("total_requests", "")),
             str(found.get("total_errors", "")), *figures, str(found.get("coverage", ""))]
        )  # fmt: skip
    return render(columns, rows, width=output.line_width())
