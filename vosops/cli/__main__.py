"""``python -m vosops.cli``."""

from vosops.cli import main

main()
