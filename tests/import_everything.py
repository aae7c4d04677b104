"""Import every module of the library, as a program: ``python tests/import_everything.py [--installed]``.

With ``--installed`` it demands an installed wheel (no file of the working tree) and is meant to be run from ``/``.
Exits non-zero when a module of the working tree is missing, does not import, or brings ``eval`` or ``pipelines`` in
as a top-level name. Part of ``make wheel`` and of tests/test_packaging.py.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = {"erasure": "erasure", "erasure.pipelines": "pipelines", "erasure.eval": "eval"}  # as in setup.cfg


def modules() -> list[str]:
    """The import name of every Python file in the three folders, read from disk and not from what is installed."""
    names = []
    for package, folder in FOLDERS.items():
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            if parts[-1] != "__main__":
                names.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--installed", action="store_true", help="demand the wheel, not the working tree")
    installed = parser.parse_args().installed
    names = modules()
    for name in names:
        module = importlib.import_module(name)
        if installed and "site-packages" not in (module.__file__ or ""):
            sys.exit(f"{name} came from {module.__file__}, not from the wheel")
    leaked = sorted({"eval", "pipelines"} & set(sys.modules))
    if leaked:
        sys.exit(f"importing the library also imported {leaked} at top level; import erasure.eval, erasure.pipelines")
    print(f"imported {len(names)} modules")


if __name__ == "__main__":
    main()
