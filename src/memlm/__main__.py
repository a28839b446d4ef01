"""`python -m memlm`."""

import sys

try:
    from memlm.cli import main
except ModuleNotFoundError as error:
    if error.name != "typer":
        raise
    print("memlm: error: the command line needs typer: pip install typer", file=sys.stderr)
    sys.exit(2)

main()
