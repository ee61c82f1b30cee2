"""The ``vllm-dspark`` command; one file for each subcommand."""

from typing import Annotated

import typer

import vllm_dspark
from vllm_dspark.cli import demo, simulate

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="DSpark for vLLM.")
app.command("demo")(demo.demo)
app.command("simulate")(simulate.simulate)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vllm-dspark {vllm_dspark.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """DSpark speculative decoding for vLLM."""


def main() -> None:
    """Console-script entry point."""
    app()
