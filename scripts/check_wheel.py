"""Check a wheel: it holds the tracked files of the package and nothing else, and works where there is no checkout.

python scripts/check_wheel.py dist/striate-0.2.0-py3-none-any.whl

The wheel is installed into a new environment. Its dependencies are those of the environment that runs this script.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_MB = 15
"""The weights of the demo's models take 13 MB of it."""


def check_files(wheel: Path) -> None:
    """Compare the files of the wheel with those that git tracks."""
    tracked = set(subprocess.check_output(["git", "ls-files", "striate"], cwd=ROOT / "src", text=True).splitlines())
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == tracked, packed ^ tracked
    assert wheel.stat().st_size < MAX_MB * 1e6, f"{wheel} has {wheel.stat().st_size / 1e6:.1f} MB"


def check_commands(wheel: Path, folder: Path) -> None:
    """Install the wheel, and run it in an empty folder."""
    venv.create(folder / "env", with_pip=True, symlinks=True)
    python, striate = folder / "env/bin/python", folder / "env/bin/striate"

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=folder, env={"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        assert not done.returncode, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel.resolve())
    [packages] = (folder / "env").glob("lib/*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    version, place = run(python, "-c", "import striate; print(striate.__version__, striate.__file__)").split()
    assert f"-{version}-" in wheel.name
    assert Path(place).is_relative_to(folder), f"{place} is not in the wheel"
    for line in run(striate, "--help").splitlines():
        if line.startswith("  "):
            assert "--" in run(striate, line.split()[0], "--help"), line


if __name__ == "__main__":
    check_files(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as empty:
        check_commands(Path(sys.argv[1]), Path(empty).resolve())
    print(f"{sys.argv[1]} is complete and works")
