"""`python -m striate`, for launchers that start modules."""

from striate.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
