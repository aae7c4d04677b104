"""``python -m erasure``."""

from erasure.cli import main

main()
