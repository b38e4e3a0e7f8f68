"""The entry point of the `vosops` command.

It is next to the package because importing anything of `vosops` imports PyTorch, which takes seconds, while
`vosops --help` and `vosops --version` should answer at once: `vosops/__init__.py` leaves PyTorch to the commands
that need it once this module has been imported.
"""


def main() -> None:
    """Run the command line."""
    from vosops.cli import main

    main()
