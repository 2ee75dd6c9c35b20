"""`herder executor`: the client node's side of a suite. Needs no head."""

from __future__ import annotations

from pathlib import Path

import click

from herder.cli import output
from herder.cli.command import Globals, pass_globals, verb

EXAMPLES = (
    "herder executor --service ollama --port 6000",
    "herder executor --service vllm --port 6000 --host 0.0.0.0 --file-root ~/datasets",
    "PYTHONPATH=. herder executor --service mine --plugin my_service",
)


@verb("executor", examples=EXAMPLES)
@click.option("--service", default="ollama", help="ollama, vllm, dummy, or one that a plugin brings.")
@click.option("--port", type=click.IntRange(0, 65_535), default=5000, help="Default 5000; 0 takes a free one.")
@click.option("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for an orchestrator elsewhere.")
@click.option("--executor-token-file", "token_file", type=click.Path(), help="Also HERDER_EXECUTOR_TOKEN_FILE.")
@click.option("--no-auth", is_flag=True, help="Ask for no token: whoever reaches the port may send load from here.")
@click.option("--file-root", "roots", multiple=True, type=click.Path(file_okay=False), help="Folder of datasets.")
@click.option("--plugin", "plugins", multiple=True, metavar="MODULE", help="A module that registers services.")
@click.option("--header", "headers", multiple=True, help="Sent to the servers, as 'Name: value'.")
@click.option("--server-token-file", type=click.Path(), help="Token for the servers, sent as a bearer token.")
@pass_globals
def command(
    options: Globals,
    /,
    service: str,
    port: int,
    host: str,
    token_file: str | None,
    no_auth: bool,
    roots: tuple[str, ...],
    plugins: tuple[str, ...],
    headers: tuple[str, ...],
    server_token_file: str | None,
) -> int:
    """Wait for a workload and send it: /health /start /status /metrics /metrics/prometheus /stop.

    Everything but /health asks for the token of a file, which is made when it is missing. The folder in which it is
    started is where datasets are looked for, unless --file-root names others; with --no-auth only those named are.
    """
    from agent.suite.errors import SuiteError
    from agent.suite.executor import serve
    from agent.suite.registry import ServiceFactory, load_plugins
    from herder.settings import read_token_file

    try:
        load_plugins(plugins)
        executor = ServiceFactory.create_workload_executor(service, port)
    except (ValueError, SuiteError) as error:
        raise click.UsageError(str(error)) from None
    if server_token_file:
        headers = (*headers, f"Authorization: Bearer {read_token_file(Path(server_token_file))}")
    folders = [Path(root).resolve() for root in roots] or ([] if no_auth else [Path.cwd()])
    serve(
        executor,
        host=host,
        token_file=token_file,
        is_open=no_auth,
        file_roots=folders,
        plugins=plugins,
        headers=headers,
        ca_file=options.ca_file,
        say=lambda text: output.note(options, text),
    )
    return output.EXIT_OK
