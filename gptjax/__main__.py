"""`python -m gptjax` is the command `gptjax`."""

import sys

from gptjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
