"""Subcommands of `lit-align` that are not methods of the Trainer: typed functions."""
