"""Known vulnerabilities among the installed packages, by pip-audit; where its data cannot be reached, a word says so.

A finding fails, unless it stands in `ACCEPTED` with the reason.
"""

from __future__ import annotations

import json
import subprocess
import sys

PATIENCE = 120  # seconds
ACCEPTED: dict[str, str] = {}  # by the name of the advisory


def main() -> int:
    """The exit status: 1 where something is found that is not accepted."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, LookupError):
        packages = []
    looked_up = [package for package in packages if "vulns" in package]
    if not looked_up:
        print("pip-audit: skipped, its data cannot be reached")
        return 0
    found = [
        f"{package['name']} {package['version']}: {one['id']}, fixed in {', '.join(one['fix_versions']) or 'none yet'}"
        for package in looked_up
        for one in package["vulns"]
        if one["id"] not in ACCEPTED
    ]
    print(*found, f"pip-audit: {len(looked_up)} packages, {len(found)} findings", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
