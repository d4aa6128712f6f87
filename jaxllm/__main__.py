"""`python -m jaxllm` is `jaxllm`."""

import sys

from jaxllm.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
