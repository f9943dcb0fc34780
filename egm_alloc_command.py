"""The command ``egm-alloc``. Outside of the package, because importing that may be what fails."""

import sys


def main() -> int:
    """Run the command line; where egm_alloc cannot be imported, say why in one sentence."""
    try:
        from egm_alloc.cli import main as run
    except ImportError as error:
        print(f"egm-alloc: {error}", file=sys.stderr)
        return 1
    return run()
