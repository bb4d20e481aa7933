"""`lightning-optim recipe`: published settings for a kind of model, as a configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lightning_optim.cli.fail import fail
from lightning_optim.cli.own_parser import OwnParser


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``recipe``.

    Args:
        parser: A parser of argparse, or of a package whose parsers are such.
    """
    parser.add_argument("name", metavar="NAME", help="name of the recipe; `lightning-optim list recipes` shows all")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="B",
        help="what one optimizer step sees, for the learning rate by the rule of the recipe's source",
    )


def run_recipe(args: Sequence[str]) -> None:
    """Print a recipe as a configuration for ``lightning-optim fit --config``.

    Args:
        args: The command line after ``recipe``.

    Raises:
        SystemExit: There is no such recipe, or it has no rule for other batch sizes.
    """
    from lightning_optim.tuning.recipes import recipe

    parser = OwnParser(
        "recipe",
        "Print published settings for a kind of model as a configuration, each number with its source.",
        "Example: lightning-optim recipe vit --batch-size 256 > run.yaml",
    )
    add_recipe_arguments(parser)
    options, rest = parser.split(args)
    if rest:
        parser.error(f"Unexpected argument {rest[0]!r}")
    try:
        found = recipe(options.name)
        if options.batch_size is not None:
            found = found.scaled_to(options.batch_size)
    except ValueError as error:
        fail(str(error), code=2)
    print(found.yaml, end="")
