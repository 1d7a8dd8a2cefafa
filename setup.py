"""Builds the extensions where they can be built; everything static is in pyproject.toml.

An isolated ``pip install .`` has no torch, and gives a wheel in pure Python. ``pip install --no-build-isolation .``
builds for the torch that is installed. What was built, and why not, is printed, one line each, and noted in
``rsa_kernels/_built.json``, from which :mod:`rsa_kernels.native` explains itself. Environment variables:

    RSA_BUILD_EXT         auto (the default): build what can be built; 0: nothing; 1: what cannot be built is an error
    FORCE_CUDA=1          an error if the CUDA extension is not built
    FORCE_CPU=1           no CUDA extension
    CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS    as for every extension of torch; ninja is used where it is found
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import setuptools
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

OLDEST_SETUPTOOLS = 77  # the first that reads the licence in pyproject.toml
OLDEST_TORCH = (2, 10)  # the first whose stable ABI has all that the kernels call
PACKAGE = "rsa_kernels"
NOTE = "_built.json"
INSTALL = "pip install --no-build-isolation ."
CUDA_ARCHITECTURES = ("8.0", "9.0a", "10.0")

MACROS = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
# NaN and infinity keep their meaning. What depends on the CPU is chosen at run time, in the sources.
UNIX_FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
MSVC_FLAGS = ["/O2", "/std:c++17"]  # not tested
# torch forbids the operators of half-precision numbers, which the kernels use.
NVCC_FLAGS = ["-O3", "-std=c++17"] + [
    f"-U__CUDA_NO_{name}__"
    for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
]


class NotBuiltError(Exception):
    """Why an extension is not built, and what to do about it."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}; {remedy}")
        self.cause, self.remedy = cause, remedy


class CompilationError(NotBuiltError):
    """An extension that should have been built, and does not compile."""


class Requests(NamedTuple):
    """What the environment variables ask for."""

    build: str  # auto, 0 or 1
    cuda: str  # auto, force or never

    def demand(self, name: str, reason: NotBuiltError) -> bool:
        """Whether an extension that is not built for this reason is an error."""
        if name == "cuda" and self.cuda == "force":
            return True
        return self.build == "1" and (name == "cpp" or isinstance(reason, CompilationError))


# What is asked for, and what is here -------------------------------------------------------------------------------


def requests(environment: Mapping[str, str]) -> Requests:
    """Reads the environment variables.

    Raises:
        SystemExit: if one has no meaning, or if two contradict each other.
    """

    def choice(name: str, default: str, values: Sequence[str]) -> str:
        value = environment.get(name) or default
        if value not in values:
            raise SystemExit(f"error: {name} is {value!r}, but must be {', '.join(values[:-1])} or {values[-1]}")
        return value

    mode = choice("RSA_BUILD_EXT", "auto", ("auto", "0", "1"))
    cuda, cpu = (choice(name, "0", ("0", "1")) == "1" for name in ("FORCE_CUDA", "FORCE_CPU"))
    if cuda and cpu:
        raise SystemExit("error: FORCE_CUDA and FORCE_CPU are both 1, but contradict each other: unset one")
    if cuda and mode == "0":
        raise SystemExit("error: FORCE_CUDA is 1 and RSA_BUILD_EXT is 0, but they contradict each other: unset one")
    return Requests(mode, "force" if cuda else "never" if cpu else "auto")


def require_setuptools(version: str) -> None:
    """Refuses one that would complain of pyproject.toml: without build isolation, pip takes the one that is there."""
    if int(version.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"error: setuptools is {version}, but must be {OLDEST_SETUPTOOLS} or later: pip install -U setuptools"
        )


def headline(error: Exception) -> str:
    """The first line of an exception's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def does_not_import(error: Exception) -> NotBuiltError:
    """The reason where torch is there, but broken."""
    return NotBuiltError(f"torch does not import ({headline(error)})", f"repair torch, then {INSTALL}")


def import_torch() -> ModuleType:
    """The torch of the build environment, which must be one that the extensions can be built for."""
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise NotBuiltError("this Python is free-threaded, and its stable ABI is another", "use a Python with the GIL")
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise NotBuiltError("torch was not in the build environment", f"where torch is, {INSTALL}") from None
        raise does_not_import(error) from error
    except Exception as error:
        raise does_not_import(error) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        raise NotBuiltError(f"torch {torch.__version__} is older than {wanted}", f"upgrade torch, then {INSTALL}")
    return torch


def import_cpp_extension(torch: ModuleType) -> ModuleType:
    """The part of torch that builds extensions, which looks for the CUDA toolkit when it is imported."""
    if torch.version.cuda and not os.environ.get("CUDA_HOME") and (home := toolkit()):
        os.environ["CUDA_HOME"] = home
    try:
        from torch.utils import cpp_extension
    except Exception as error:
        raise does_not_import(error) from error
    return cpp_extension


def run(command: Sequence[str], given: str = "") -> tuple[int, str]:
    """Exit status and output of a command, in English."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=environment,
        )
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout


def compiler_name(command: Sequence[str]) -> str:
    """Name and version of a compiler for C++17 and for Python's headers, which must work."""
    status, output = run([*command, "--version"])
    if status:
        raise NotBuiltError(
            f"there is no C++ compiler ({shlex.join(command)} does not run)",
            f"install one, for example g++, or set CXX, then {INSTALL}",
        )
    introduction = output.partition("\n")[0]
    version = re.search(r"\d+(\.\d+)+", introduction)
    name = "Clang" if "clang" in introduction.lower() else "GCC"
    name += f" {version.group()}" if version else ""
    program = "#include <optional>\n#include <string_view>\nint main() { if constexpr (true) return 0; }\n"
    status, output = run([*command, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"], program)
    if status:
        raise NotBuiltError(
            f"{name} does not compile C++17 ({first_error(output)})",
            f"install a later one, or name it in CXX, then {INSTALL}",
        )
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise NotBuiltError(
            "the headers of this Python are not installed (there is no Python.h)",
            f"install them, for example python{sysconfig.get_python_version()}-dev, then {INSTALL}",
        )
    return name


def first_error(output: str, otherwise: str = "") -> str:
    """The line that says what went wrong, without the paths of this machine; otherwise, that, or the last line."""
    lines = [line.strip() for line in output.replace(f"{Path.cwd()}{os.sep}", "").splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\berror\b|undefined reference|cannot find", line, re.IGNORECASE)]
    return next(iter(telling), otherwise or next(reversed(lines), "it says nothing"))


def toolkit() -> str | None:
    """The root of the CUDA toolkit whose nvcc is on the path, which may be a script somewhere else."""
    nvcc = shutil.which("nvcc")
    found = nvcc and re.search(r"^#\$ TOP=(.*)$", run([nvcc, "--dryrun", "-x", "cu", os.devnull])[1], re.MULTILINE)
    return os.path.realpath(found.group(1).strip()) if found else None


def check_cuda(torch: ModuleType, home: str | None, tell: Callable[[Sequence[str]], tuple[int, str]] = run) -> str:
    """The version of the nvcc in a toolkit, which must fit torch. That a GPU is here is not asked."""
    if torch.version.hip:
        raise NotBuiltError(
            f"torch {torch.__version__} is for AMD GPUs, and the kernels are for NVIDIA's", "use the triton backend"
        )
    if not torch.version.cuda:
        raise NotBuiltError(f"torch {torch.__version__} has no CUDA", f"install a CUDA build of torch, then {INSTALL}")
    if not home:
        raise NotBuiltError(
            "nvcc was not found", f"install CUDA {torch.version.cuda}'s toolkit or set CUDA_HOME, then {INSTALL}"
        )
    status, output = tell([str(Path(home, "bin", "nvcc")), "--version"])
    release = re.search(r"release (\d+\.\d+)", output)
    if status or not release:
        raise NotBuiltError(f"the nvcc of the toolkit in {home} does not run", f"set CUDA_HOME, then {INSTALL}")
    version = release.group(1)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise NotBuiltError(
            f"nvcc is of CUDA {version}, and torch {torch.__version__} of CUDA {torch.version.cuda}",
            f"install a toolkit of CUDA {torch.version.cuda.split('.')[0]} and set CUDA_HOME, then {INSTALL}",
        )
    return version


def architectures(supported: str) -> str:
    """Those that the kernels are tuned for, as far as nvcc knows them, and PTX for what comes after.

    Args:
        supported: what ``nvcc --list-gpu-code`` prints, which is without the variants that end with a letter.
    """
    known = supported.split()
    chosen = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch.replace('.', '').rstrip('a')}" in known]
    if not chosen:
        raise NotBuiltError(
            f"nvcc knows none of the architectures {', '.join(CUDA_ARCHITECTURES)}",
            f"install a later toolkit, or set TORCH_CUDA_ARCH_LIST, then {INSTALL}",
        )
    # The PTX of an architecture with an "a" runs on that one alone.
    if chosen[-1].endswith("a"):
        chosen.append(chosen[-1].rstrip("a"))
    return ";".join(chosen) + "+PTX"


# Building ----------------------------------------------------------------------------------------------------------


def plan(name: str, asked: Requests) -> tuple[setuptools.Extension, dict[str, str]]:
    """An extension, and for what it is built.

    Raises:
        NotBuiltError: if it is not asked for, or cannot be built here.
    """
    if asked.build == "0":
        raise NotBuiltError("RSA_BUILD_EXT was 0", f"without it, {INSTALL}")
    if name == "cuda" and asked.cuda == "never":
        raise NotBuiltError("FORCE_CPU was 1", f"without it, {INSTALL}")
    folder = Path("csrc", "cpu" if name == "cpp" else "cuda")
    sources = sorted(path.as_posix() for suffix in ("cpp", "cu") for path in folder.glob(f"*.{suffix}"))
    if not sources:
        raise NotBuiltError(
            f"there are no sources in {folder.as_posix()}", f"from a full copy of the sources, {INSTALL}"
        )
    torch = import_torch()
    cpp_extension = import_cpp_extension(torch)
    facts = {"torch": torch.__version__, "platform": sysconfig.get_platform()}
    if name == "cuda":
        facts["cuda"] = check_cuda(torch, cpp_extension.CUDA_HOME)
        nvcc = str(Path(cpp_extension.CUDA_HOME, "bin", "nvcc"))
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(run([nvcc, "--list-gpu-code"])[1])
        facts["architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"]
    windows = sys.platform == "win32"
    facts["compiler"] = "MSVC" if windows else compiler_name(shlex.split(cpp_extension.get_cxx_compiler()))

    flags = {"cxx": MSVC_FLAGS, "nvcc": NVCC_FLAGS}
    if not windows:
        flags = {"cxx": UNIX_FLAGS, "nvcc": [*NVCC_FLAGS, "-Xcompiler=-fvisibility=hidden"]}
    kind = cpp_extension.CppExtension if name == "cpp" else cpp_extension.CUDAExtension
    extension = kind(
        f"{PACKAGE}._{name}",
        sources,
        define_macros=MACROS if name == "cpp" else [*MACROS, ("USE_CUDA", None)],
        depends=sorted(path.as_posix() for path in Path("csrc").rglob("*.*h")),
        extra_compile_args=flags,
        py_limited_api=True,
    )
    # Less than torch's own list: what the stable ABI lives in.
    extension.libraries = ["c10", "torch_cpu"] if name == "cpp" else ["c10", "torch_cpu", "torch_cuda", "cudart"]
    return extension, facts


@contextmanager
def overheard() -> Iterator[list[str]]:
    """Collects what compilers write to this process's outputs, and passes it on at the end."""
    heard: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        outputs = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield heard
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, output in enumerate(outputs, start=1):
                os.dup2(output, target)
                os.close(output)
            file.seek(0)
            heard.append(file.read().decode(errors="replace"))
            print(heard[0], flush=True)


class BuildWherePossible(build_ext):
    """Decides when it runs, so that torch is imported only where something is to be built."""

    def run(self) -> None:
        """Builds each extension that can be built, and notes what became of it."""
        asked = requests(os.environ)
        built, note = [], {}
        for name in ("cpp", "cuda"):
            label = f"{PACKAGE}._{name}"
            self._remove_what_is_old(name)
            try:
                extension, note[name] = plan(name, asked)
                self._compile(extension, note[name]["compiler"])
            except NotBuiltError as reason:
                if asked.demand(name, reason):
                    raise SystemExit(f"error: {label} was asked for, but is not built: {reason}") from None
                print(f"{label}: not built: {reason}", flush=True)
                note[name] = {"cause": reason.cause, "remedy": reason.remedy}
            else:
                built.append(extension)
                print(f"{label}: built for " + ", ".join(f"{key} {value}" for key, value in note[name].items()))
        self._tell_other_commands(built)
        for folder in self._folders():
            folder.mkdir(parents=True, exist_ok=True)
            Path(folder, NOTE).write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")

    def _compile(self, extension: setuptools.Extension, compiler: str) -> None:
        """Builds one extension, by a command of its own: what fails leaves no trace in the next."""
        from torch.utils.cpp_extension import BuildExtension

        self.distribution.ext_modules = [extension]
        command = BuildExtension(self.distribution)
        for option in ("build_lib", "build_temp", "inplace", "editable_mode", "debug"):
            setattr(command, option, getattr(self, option))
        try:
            with overheard() as heard:
                command.ensure_finalized()
                command.run()
        except Exception as error:
            cause = first_error("".join(heard), headline(error))
            raise CompilationError(
                f"it does not compile with {compiler} ({cause})", f"repair that, then {INSTALL}"
            ) from error
        self.ext_map.update(command.ext_map)

    def _tell_other_commands(self, built: list[setuptools.Extension]) -> None:
        """Makes the wheel one for this platform, or for any."""
        self.extensions = self.distribution.ext_modules = built
        wheel: Any = self.distribution.get_command_obj("bdist_wheel", create=False)
        if wheel is not None:
            wheel.root_is_pure = not built

    def _folders(self) -> list[Path]:
        """Where the package is put together, and where it lies if it is built in place."""
        return [Path(self.build_lib, PACKAGE)] + ([Path(PACKAGE)] if self.inplace else [])

    def _remove_what_is_old(self, name: str) -> None:
        """Removes what an earlier build left, which would be packed or loaded as if it were of this one."""
        for folder in self._folders():
            for path in [*folder.glob(f"_{name}.*so"), *folder.glob(f"_{name}.*pyd"), *folder.glob(NOTE)]:
                path.unlink()


class BuildAlwaysAsks(build):
    """Runs ``build_ext`` whether or not extensions were declared: it alone knows whether there will be any."""

    sub_commands: ClassVar = [(name, None if name == "build_ext" else asks) for name, asks in build.sub_commands]


if __name__ == "__main__":
    require_setuptools(setuptools.__version__)
    # pip finds ninja in an environment that is not activated, too.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    stable = not sysconfig.get_config_var("Py_GIL_DISABLED")
    setuptools.setup(
        cmdclass={"build": BuildAlwaysAsks, "build_ext": BuildWherePossible},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if stable else {},
    )
