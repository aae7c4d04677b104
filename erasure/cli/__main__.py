"""``python -m erasure.cli``."""

from erasure.cli import main

main()
