"""The command line: one file per command, thin over the same calls that scripts use.

A new command is a module here with a function of its name, and one name more in `app.COMMANDS`. Importing this package
imports neither jax nor the model: commands do so when they run, so that --help and mistakes answer at once.
"""

from ds4jax.cli.app import main

__all__ = ["main"]
