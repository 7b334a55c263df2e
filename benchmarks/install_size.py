"""Size of a base install in an empty environment, and whether every platform gets ready-made wheels.

Usage: ``python benchmarks/install_size.py [--skip-platforms]``. Exits with 1 where the install is above the limit
or a platform lacks a wheel.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_MB = 700

# Newest first, as pip's own list of tags for such a machine.
PLATFORMS = {
    "Linux x86-64": [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"],
    "Linux aarch64": [f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 24, 17)] + ["manylinux2014_aarch64"],
    "macOS arm64": [f"macosx_{major}_0_arm64" for major in (14, 13, 12, 11)],
}


def megabytes(folder: Path) -> float:
    """Bytes that the files under a folder take on disk, in units of 10^6; hard links count once."""
    seen: dict[tuple[int, int], int] = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            status = (Path(parent) / name).lstat()
            seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values()) / 1e6


def base_install(work: Path) -> float:
    """Install Crosslane without its tests' tools into an empty environment; returns its size in MB, pip left out."""
    environment = work / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    before = megabytes(environment)
    # By way of the source archive: a build inside the checkout would leave a folder that later builds pick up.
    subprocess.run([sys.executable, "-m", "build", "--outdir", work, ROOT], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = work.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--only-binary=:all:", wheel], check=True, cwd=work)
    sizes = {
        path.name: megabytes(path) for path in (environment / "lib").glob("python*/site-packages/*") if path.is_dir()
    }
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:12]:
        print(f"  {size:7.1f} MB  {name}")
    return megabytes(environment) - before


def requirements_for(platform: str) -> list[str]:
    """The base requirements that apply to a platform: pip evaluates markers for the machine that it runs on."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    chosen = []
    for requirement in listed:
        name, _, marker = requirement.partition(";")
        if not marker or platform == "Linux x86-64":
            chosen.append(name.strip())
    return chosen


def has_wheels(platform: str, python: str, work: Path) -> bool:
    """Whether pip resolves the base set for a platform with wheels alone; prints the download's size."""
    folder = work / f"{platform}-{python}".replace(" ", "_")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--implementation", "cp", "--python-version", python]
    command += [word for tag in PLATFORMS[platform] for word in ("--platform", tag)]
    done = subprocess.run([*command, *requirements_for(platform)], check=False)
    if done.returncode == 0:
        print(f"  {platform}, Python {python}: {len(list(folder.iterdir()))} wheels, {megabytes(folder):.0f} MB")
    else:
        print(f"  {platform}, Python {python}: no complete set of wheels")
    return done.returncode == 0


def main() -> int:
    """Print both findings; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--skip-platforms", action="store_true", help="measure the install only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        print("Base install, largest packages:")
        size = base_install(work)
        print(f"Base install: {size:.0f} MB (limit {LIMIT_MB} MB)")
        complete = True
        if not options.skip_platforms:
            print("Wheels of the base set:")
            for platform in PLATFORMS:
                for python in ("3.11", "3.12", "3.13"):
                    complete &= has_wheels(platform, python, work)
    return 0 if size <= LIMIT_MB and complete else 1


if __name__ == "__main__":
    sys.exit(main())
