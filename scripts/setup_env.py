"""Sets up the virtual environment of the make targets and builds the extension in place.

The torch of the active environment or container is used if it fits; only otherwise is one
installed, into the virtual environment. What can be imported already is never installed, so with
everything there no network is needed. Quick when there is nothing to do.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from build_backend import cuda_headers, target_torch  # noqa: E402

DEFAULT_TORCH = f"2.{target_torch.OLDEST_MINOR}"

# What to import, and what to install where that fails.
BUILD_TOOLS = {"setuptools": "setuptools>=64,<82", "wheel": "wheel", "ninja": "ninja"}
# numpy: without it torch warns when it is imported, and the tests take warnings for errors.
TEST_TOOLS = {
    "pytest": "pytest>=8",
    "xdist": "pytest-xdist>=3",
    "hypothesis": "hypothesis>=6",
    "numpy": "numpy",
    "matplotlib": "matplotlib>=3.8",
}

# Pinned, because another version of a formatter finds other faults.
LINT_TOOLS = ["ruff==0.17.6", "mypy==2.4.1", "clang-format==21.1.8"]


def check_machine() -> None:
    """Exit with one sentence if the machine lacks what cannot be installed from here."""
    if not sys.platform.startswith("linux"):
        sys.exit("egm_alloc: only Linux is supported")
    if sys.version_info < (3, 10):  # noqa: UP036 - the package's own floor is told here
        sys.exit(f"egm_alloc: {sys.executable} is too old; put Python 3.10 or newer on the PATH")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        sys.exit("egm_alloc: Python's headers are missing: type 'apt-get install python3-dev'")
    if not shutil.which((os.environ.get("CXX") or "c++").split()[0]):
        sys.exit("egm_alloc: no C++ compiler here: type 'apt-get install g++'")


def active_torch(wanted: str | None) -> target_torch.TargetTorch | None:
    """Return the torch of the active environment if it fits, else None.

    Parameters
    ----------
    wanted : str or None
        The minor version asked for, such as ``"2.12"``; None takes any that is supported.
    """
    torch = target_torch.describe()
    if torch is None:
        return None
    problem = target_torch.problem(torch)
    if problem is None and wanted not in (None, minor_of(torch)):
        problem = f"torch {wanted} is asked for"
    if problem is not None:
        print(f"egm_alloc: not using torch {torch.version} of {sys.executable}: {problem}")
        return None
    return torch


def minor_of(torch: target_torch.TargetTorch) -> str:
    """Return the minor version as it is written on the command line."""
    return ".".join(map(str, torch.minor or ()))


# Also tells an environment of ours from the user's own.
_MARK = "_source_tree.pth"


def make_venv(venv: Path, borrowed: target_torch.TargetTorch | None) -> None:
    """Make the virtual environment, with a view of the active one's packages if they are used."""
    if venv.exists() and any(venv.iterdir()) and not any(venv.glob(f"lib/*/site-packages/{_MARK}")):
        sys.exit(f"egm_alloc: {venv} was not made by this command: activate, move or remove it")
    print(f"egm_alloc: making {venv.name}", flush=True)
    if subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=False).returncode:
        sys.exit(f"egm_alloc: 'python3 -m venv {venv}' failed: type 'apt-get install python3-venv'")
    # Sorts before the other one: the source tree comes before an egm_alloc installed elsewhere.
    (site_packages(venv) / _MARK).write_text(f"{ROOT}\n")
    if borrowed is not None:
        print(f"egm_alloc: using torch {borrowed.version} of {sys.executable}")
        standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
        folders = [
            folder
            for folder in dict.fromkeys(borrowed.search_path)
            if folder not in standard
            and not folder.endswith("lib-dynload")
            and ROOT not in (Path(folder), Path(folder).parent)
        ]
        (site_packages(venv) / "active_environment.pth").write_text("\n".join(folders) + "\n")


def site_packages(venv: Path) -> Path:
    """Return the folder that a virtual environment's own packages are in."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return venv / "lib" / version / "site-packages"


def pip_install(python: Path, requirements: list[str]) -> None:
    """Install packages into the virtual environment."""
    print(f"egm_alloc: installing {' '.join(requirements)}", flush=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*command, *requirements], check=False).returncode:
        sys.exit(f"egm_alloc: pip could not install {' '.join(requirements)}")


def lacking(python: Path, tools: dict[str, str]) -> list[str]:
    """Return what to install of the tools that the virtual environment cannot import."""
    probe = (
        "from importlib.util import find_spec; import sys; "
        "print(*(name for name in sys.argv[1:] if not find_spec(name)))"
    )
    answer = subprocess.run(
        [python, "-c", probe, *tools], stdout=subprocess.PIPE, text=True, check=True
    )
    return [tools[name] for name in answer.stdout.split()]


def lacking_versions(python: Path, pins: list[str]) -> list[str]:
    """Return the pins that the virtual environment does not meet."""
    probe = (
        "from importlib.metadata import distributions; "
        "print(*(f'{found.name}=={found.version}' for found in distributions()))"
    )
    answer = subprocess.run([python, "-c", probe], stdout=subprocess.PIPE, text=True, check=True)
    return [pin for pin in pins if pin not in answer.stdout.split()]


def missing_headers(torch: target_torch.TargetTorch) -> list[str]:
    """Return the packages of CUDA headers that neither a toolkit nor pip has brought."""
    assert torch.cuda is not None  # target_torch.problem has checked it
    machine = os.uname().machine
    return cuda_headers.find(torch.cuda, torch.search_path, os.environ, machine)[1]


def is_built(torch: target_torch.TargetTorch) -> bool:
    """Say whether the build in the source tree is for this torch and newer than its sources."""
    library = ROOT / "egm_alloc" / f"_C{EXTENSION_SUFFIXES[0]}"
    build_info = ROOT / "egm_alloc" / "_build_info.py"
    if not library.exists() or not build_info.exists():
        return False
    facts = runpy.run_path(str(build_info))
    if (facts["TORCH_VERSION"], facts["TORCH_GIT_VERSION"]) != (torch.version, torch.git_version):
        return False
    sources = [ROOT / "setup.py", *ROOT.glob("build_backend/*.py"), *ROOT.glob("csrc/**/*")]
    return library.stat().st_mtime > max(source.stat().st_mtime for source in sources)


def build(python: Path, venv: Path, torch: target_torch.TargetTorch) -> None:
    """Build the extension into the source tree; each environment keeps its own object files."""
    print(f"egm_alloc: building for torch {torch.version}", flush=True)
    command = [str(python), "setup.py", "--quiet", "build_ext", "--inplace"]
    command += ["--build-temp", f"build/{venv.name}", "--build-lib", f"build/{venv.name}/lib"]
    log = venv / "build.log"
    with log.open("w") as output:
        done = subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        sys.exit(f"{log.read_text()}\negm_alloc: the build failed; its output is in {log}")


def main() -> None:
    """Set up what is asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True, help="the virtual environment")
    parser.add_argument("--torch", metavar="X.Y", help="the minor version of torch to use")
    parser.add_argument("--lint", action="store_true", help="install the lint tools too")
    options = parser.parse_args()
    minors = range(target_torch.OLDEST_MINOR, target_torch.NEWEST_MINOR + 1)
    supported = [f"2.{minor}" for minor in minors]
    if options.torch and options.torch not in supported:
        parser.error(f"--torch is {options.torch!r}; allowed: {', '.join(supported)}")
    check_machine()

    venv = options.venv.absolute()
    python = venv / "bin" / "python"
    stamp = venv / "egm_alloc_environment.txt"
    borrowed = active_torch(options.torch)
    if Path(sys.prefix).resolve() != venv.resolve():
        state = f"{sys.executable} {sys.version}\n"
        if borrowed is not None:
            state += f"{borrowed.folder} {borrowed.version} {borrowed.git_version}\n"
        if not stamp.exists() or stamp.read_text() != state:
            make_venv(venv, borrowed)
            if borrowed is None:
                pip_install(python, [f"torch=={options.torch or DEFAULT_TORCH}.*"])
            stamp.write_text(state)

    torch = target_torch.ask(str(python))
    if torch is None:
        sys.exit(f"egm_alloc: {target_torch.absence(str(python))}")
    problem = target_torch.problem(torch)
    if problem is not None:
        sys.exit(f"egm_alloc: {problem}")
    packages = lacking(python, {**BUILD_TOOLS, **TEST_TOOLS}) + missing_headers(torch)
    if options.lint:
        packages += lacking_versions(python, LINT_TOOLS)
    if packages:
        pip_install(python, packages)
    if not is_built(torch):
        build(python, venv, torch)


if __name__ == "__main__":
    main()
