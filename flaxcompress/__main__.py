"""`python -m flaxcompress` is the command `flaxcompress`."""

from flaxcompress.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
