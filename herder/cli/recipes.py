"""`herder recipes`: how engines can be run."""

from __future__ import annotations

import click

from herder.cli import output, views
from herder.cli.command import Globals, pass_globals, verb


@verb("recipes", examples=("herder recipes", "herder recipes --category inference -o yaml"))
@click.option("--category", default="", help="Only recipes of this category.")
@pass_globals
def command(options: Globals, category: str) -> None:
    """List recipes. `-o yaml` also shows the settings of each, with their defaults."""
    with options.connect() as client:
        found = client.recipes(category=category).all()
    rows = [views.recipe_row(recipe) for recipe in found]
    shown = output.table(options, views.RECIPES, rows, empty="the head has no recipes")
    output.emit(options, found, shown, quiet="\n".join(recipe.name for recipe in found))
