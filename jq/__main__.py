"""`python -m jq` is `jaxq`."""

import sys

from jq.cli import main

if __name__ == "__main__":
    sys.exit(main())
