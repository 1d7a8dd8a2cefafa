"""Runs the C++ kernels under sanitizers: ``python tests/cpp/sanitize.py``; an argument narrows it to one of two parts.

extension: it is built for the address and undefined-behaviour sanitizers, and the tests with small cases run on it.
threads: ``threads.cpp`` calls the kernels without torch, with threads of its own; once for the thread sanitizer, once
for the other two.

It ends at the first finding. Needs Linux, g++ or clang++ with their sanitizers, and torch.
"""

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cpu"
MEMORY = "address,undefined"
DEBUGGABLE = ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g"]
# The address sanitizer finds null pointers, too; a check before each access would double the time.
FLAGS = {
    MEMORY: [f"-fsanitize={MEMORY}", "-fno-sanitize=null", *DEBUGGABLE, "-O1"],
    # With less optimisation it would watch local variables.
    "thread": ["-fsanitize=thread", *DEBUGGABLE, "-O2"],
}
# That check, which Clang makes by default, moves local variables: GCC 12 takes them for aligned to 64 bytes there, too.
AS_ALIGNED = "detect_stack_use_after_return=0"
TESTS = ["tests/cpp", *(f"tests/rsa_kernels/test_{name}.py" for name in ("exactness", "golden", "memory"))]
LEFT_OUT = {
    "test_workers_of_a_data_loader_may_call": "a fork may find a lock of the address sanitizer shut for ever",
    "test_processes_of_torch_multiprocessing_may_call": "each of its processes imports torch anew, and does the same",
    "test_several_threads_do_work": "it asks a process that has another extension",
    "test_the_bits_do_not_depend_on_the_number_of_threads": "threads.cpp asks the same, in less time",
    "test_strides_past_two_to_the_31": "marks of what is freed, a byte for every eight, take gigabytes of real memory",
}
# Tests in a process that has seen the extension come from where it was built.
PYTEST = """
import sys
from pathlib import Path
import pytest

class Origin:
    def pytest_collection_finish(self, session):
        import rsa_kernels._cpp
        if not Path(rsa_kernels._cpp.__file__).is_relative_to(sys.argv[1]):
            pytest.exit("the extension that was loaded is not the one for sanitizers", returncode=1)
        print("the tests load the extension for sanitizers:", rsa_kernels._cpp.__file__)

sys.exit(pytest.main(sys.argv[2:], plugins=[Origin()]))
"""
FINDING = re.compile(
    r"((?:ERROR|WARNING|FATAL): \w+Sanitizer:? .*|\w+Sanitizer: CHECK failed.*|.*runtime error: .*|FAIL .*)"
)


class CheckError(Exception):
    """What is wrong, in a sentence."""


def say(sentence: str) -> None:
    """Prints a sentence at once."""
    print(sentence, flush=True)


def run(title: str, command: Sequence[str | Path], show: bool = True, **variables: str) -> str:
    """The output of a command, which is shown while it runs and must succeed."""
    start, parts = time.monotonic(), []
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
    ) as process:
        # As it comes, not by lines: pytest's dots tell that it goes on.
        while process.stdout and (part := process.stdout.read(1 << 16)):
            parts.append(part)
            if show:
                sys.stdout.buffer.write(part)
                sys.stdout.buffer.flush()
    text = b"".join(parts).decode(errors="replace")
    if process.returncode:
        if not show:
            print(text)
        finding = FINDING.search(text)
        if finding and "unexpected memory mapping" in finding.group():
            raise CheckError("the thread sanitizer needs less random addresses: setarch -R make check-sanitize")
        cause = finding.group().strip() if finding else f"it ended with status {process.returncode}"
        raise CheckError(f"{title}: {cause}")
    say(f"ok   {title} ({time.monotonic() - start:.0f} s)")
    return text


class Compiler:
    """The compiler that ``CXX`` names, or else g++ or clang++."""

    def __init__(self) -> None:
        named = shlex.split(os.environ.get("CXX", ""))
        found = [[path] for path in map(shutil.which, ("g++", "clang++")) if path]
        if named and shutil.which(named[0]):
            found = [named]
        elif named or not found:
            raise CheckError(f"needs {named[0] if named else 'g++ or clang++'}, which is not on the path: install it")
        self.command = found[0]
        self.is_clang = "clang" in self._answer("--version").lower()

    def _answer(self, question: str) -> str:
        return subprocess.run([*self.command, question], capture_output=True, text=True, check=False).stdout.strip()

    def _library(self, *names: str) -> str:
        """The path of a library that comes with the compiler, by the first of its names that is there."""
        paths = [Path(self._answer(f"-print-file-name={name}")) for name in names]
        for path in paths:
            if path.is_absolute() and path.is_file():
                return str(path.resolve())
        raise CheckError(f"{self.command[0]} has no {names[0]}: install the sanitizers that belong to it")

    def preloaded(self) -> str:
        """What must be there before Python, which is not compiled for the sanitizer."""
        names = ["libasan.so"]
        if self.is_clang:
            names = [f"libclang_rt.asan{machine}.so" for machine in ("", f"-{os.uname().machine}")]
        # The sanitizer replaces a function of the second, which Python itself does not load.
        return ":".join([self._library(*names), self._library("libstdc++.so.6")])

    def for_extension(self, folder: Path) -> Path:
        """A command that has the last word: flags of setup.py, and Python's -fwrapv, come after the environment's."""
        flags = [*FLAGS[MEMORY], "-fno-wrapv", *(["-shared-libasan"] if self.is_clang else [])]
        script = folder / "compiler"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(self.command)} "$@" {shlex.join(flags)}\n', encoding="utf-8")
        script.chmod(0o755)
        return script

    def program(self, sanitizers: str, folder: Path) -> Path:
        """``threads.cpp`` with the kernels."""
        folder.mkdir()
        usual = runpy.run_path(str(ROOT / "setup.py"))["UNIX_FLAGS"]
        flags = [*usual, *FLAGS[sanitizers], "-pthread", "-I", KERNELS]
        sources = [path for path in sorted(KERNELS.glob("*.cpp")) if path.name != "binding.cpp"]
        sources.append(Path(__file__).with_name("threads.cpp"))

        def compiled(source: Path) -> Path:
            target = folder / f"{source.stem}.o"
            run(f"{source.name} for {sanitizers}", [*self.command, *flags, "-c", source, "-o", target], show=False)
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compiled, sources))
        program = folder / "threads"
        run(f"linked for {sanitizers}", [*self.command, *flags, *objects, "-o", program], show=False)
        return program


def check_extension(compiler: Compiler, folder: Path) -> None:
    """The tests of the C++ backend, with small cases, on an extension for the address sanitizer."""
    preloaded = compiler.preloaded()
    library = folder / "library"
    run(
        "the extension is built for " + MEMORY,
        [
            *(sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", folder),
            *("build", "--build-base", folder / "build", "--build-lib", library),
        ],
        show=False,
        CXX=str(compiler.for_extension(folder)),
        LDFLAGS=f"-fsanitize={MEMORY}",
        FORCE_CPU="1",
        RSA_BUILD_EXT="1",
        TORCH_DONT_CHECK_COMPILER_ABI="1",
    )
    (extension,) = library.glob("rsa_kernels/_cpp.*so")
    if b"__asan_report" not in extension.read_bytes() or b"__ubsan_handle" not in extension.read_bytes():
        raise CheckError("the extension that was built calls no sanitizer")
    for name, reason in LEFT_OUT.items():
        say(f"     without {name}: {reason}")
    unwanted = " or ".join(LEFT_OUT)
    run(
        f"the tests of cpp under {MEMORY}: " + " ".join(TESTS),
        [
            *(sys.executable, "-c", PYTEST, library, *TESTS, "-k", f"cpp and not ({unwanted})"),
            # Uncaptured, because a finding ends the process.
            *("-rs", "-x", "--capture=no", "-p", "no:cacheprovider"),
            *("-o", f"pythonpath={shlex.quote(str(library))} . tests"),
        ],
        LD_PRELOAD=preloaded,
        OMP_WAIT_POLICY="PASSIVE",  # threads of torch that spin take the time of those that work
        # Python keeps much of its memory until its end, which would all be called leaks.
        **options(ASAN_OPTIONS=f"detect_leaks=0:{AS_ALIGNED}"),
    )


def options(**extra: str) -> Mapping[str, str]:
    """Environment variables of the sanitizers."""
    return {"UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1", **extra}


def check_threads(compiler: Compiler, folder: Path) -> None:
    """``threads.cpp``, for the thread sanitizer and for the others."""
    for sanitizers in ("thread", MEMORY):
        program = compiler.program(sanitizers, folder / sanitizers)
        run(f"threads.cpp under {sanitizers}", [program], **options(ASAN_OPTIONS=AS_ALIGNED))


PARTS = {"threads": check_threads, "extension": check_extension}


def main() -> None:
    """Runs what the arguments name, or all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="all of them by default")
    wanted = parser.parse_args().part
    try:
        if sys.platform != "linux":
            raise CheckError("needs Linux, where a sanitizer can be loaded before Python")
        compiler = Compiler()
        for name in [wanted] if wanted else PARTS:
            with tempfile.TemporaryDirectory() as temporary:
                PARTS[name](compiler, Path(temporary))
    except CheckError as error:
        sys.exit(f"FAIL {error}")
    say("No sanitizer found anything.")


if __name__ == "__main__":
    main()
