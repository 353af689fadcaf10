"""`python -m miles_cli`: the same program as the console script."""

from __future__ import annotations

from miles_cli.main import main

if __name__ == "__main__":
    main()
