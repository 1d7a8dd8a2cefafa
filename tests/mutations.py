"""Breaks a backend's code on purpose, one fault at a time, and proves that the tests see each.

Every fault is written into a copy of the sources, where the tests that should see it run. A script of faults fails if
one of them stays green, or if a fault no longer fits the code. An argument narrows it to the faults whose description
holds it.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
PARTS = ("csrc", "rsa_kernels", "rsanet", "tests", "benchmarks")
NOT_COPIED = shutil.ignore_patterns("__pycache__", "results", "*.so", "_built.json")


def judge(fault, tests, build, variables):
    """Runs the tests on a copy with the fault; returns whether they saw it, and the line to print."""
    name, path, right, wrong, chosen = fault
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            shutil.copytree(ROOT / part, Path(folder) / part, ignore=NOT_COPIED)
        for file in ("pyproject.toml", "setup.py", "README.md"):
            shutil.copy(ROOT / file, folder)
        source = Path(folder) / path
        text = source.read_text()
        if right not in text:
            return False, f"GONE   {name}: {path} has no {right!r}"
        source.write_text(text.replace(right, wrong))
        environment = {**os.environ, "PYTHONPATH": folder, **variables}

        def run(*arguments):
            command = [sys.executable, *arguments]
            return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

        if build and run("setup.py", "build_ext", "--inplace").returncode:
            return False, f"BROKEN {name}: it does not compile"
        done = run("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests, "-k", chosen)
    # A test failed; one that could not even be collected would prove nothing.
    seen = done.returncode == 1 and "FAILED" in done.stdout
    # A read from memory that is not there, or an emulator that refused.
    crashed = done.returncode < 0 or "Fatal Python error" in done.stderr
    return seen or crashed, f"{'seen  ' if seen or crashed else 'MISSED'} {name}"


def prove(faults, *tests, workers=1, build=False, **variables):
    """Judges faults, ``(what is wrong, where, the right code, the wrong code, which tests run)``; the exit status.

    With ``build`` the C++ extension is built from each copy; ``variables`` are set in the environment of the tests.
    """
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen, results = [fault for fault in faults if wanted in fault[0]], []
    with ThreadPoolExecutor(workers) as pool:
        for seen, line in pool.map(lambda fault: judge(fault, tests, build, variables), chosen):
            print(line, flush=True)
            results.append(seen)
    print(f"{sum(results)} of {len(results)} faults seen")
    return 0 if results and all(results) else 1
