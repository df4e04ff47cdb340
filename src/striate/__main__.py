"""`python -m striate`, for launchers that start modules."""

from striate.runs.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
