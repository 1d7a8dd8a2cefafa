"""What setup.py decides, without a compiler; and that a wheel is what its name says."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    """setup.py as a module: it builds only when it is run."""
    spec = spec_from_file_location("rsa_setup", ROOT / "setup.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torch(version="2.13.0+cu130", cuda="13.0", hip=None):
    return SimpleNamespace(__version__=version, version=SimpleNamespace(cuda=cuda, hip=hip))


# What the environment asks for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "build", "cuda"),
    [
        ({}, "auto", "auto"),
        ({"RSA_BUILD_EXT": "", "FORCE_CUDA": "", "FORCE_CPU": "0"}, "auto", "auto"),
        ({"RSA_BUILD_EXT": "0"}, "0", "auto"),
        ({"RSA_BUILD_EXT": "1", "FORCE_CUDA": "1"}, "1", "force"),
        ({"RSA_BUILD_EXT": "1", "FORCE_CPU": "1"}, "1", "never"),
    ],
)
def test_requests(script, environment, build, cuda):
    assert script.requests(environment) == (build, cuda)


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"RSA_BUILD_EXT": "yes"}, "RSA_BUILD_EXT is 'yes', but must be auto, 0 or 1"),
        ({"FORCE_CUDA": "on"}, "FORCE_CUDA is 'on', but must be 0 or 1"),
        ({"FORCE_CUDA": "1", "FORCE_CPU": "1"}, "FORCE_CUDA and FORCE_CPU are both 1, but contradict each other"),
        ({"FORCE_CUDA": "1", "RSA_BUILD_EXT": "0"}, "FORCE_CUDA is 1 and RSA_BUILD_EXT is 0, but they contradict"),
    ],
)
def test_requests_without_a_meaning_are_refused_in_one_sentence(script, environment, sentence):
    with pytest.raises(SystemExit) as refusal:
        script.requests(environment)
    assert refusal.value.code.startswith(f"error: {sentence}")
    assert "\n" not in refusal.value.code


@pytest.mark.parametrize(
    ("environment", "absent", "fails"),
    [
        ({}, "", ""),
        ({"RSA_BUILD_EXT": "1"}, "cpp", "cpp cuda"),
        ({"FORCE_CUDA": "1"}, "cuda", "cuda"),
        ({"RSA_BUILD_EXT": "1", "FORCE_CUDA": "1"}, "cpp cuda", "cpp cuda"),
        # Left out on request is no error.
        ({"RSA_BUILD_EXT": "1", "FORCE_CPU": "1"}, "cpp", "cpp cuda"),
    ],
)
def test_what_is_an_error_if_it_is_not_built(script, environment, absent, fails):
    asked = script.requests(environment)
    for kind, errors in ((script.NotBuiltError, absent), (script.CompilationError, fails)):
        assert [name for name in ("cpp", "cuda") if asked.demand(name, kind("cause", "remedy"))] == errors.split()


def test_an_old_setuptools_is_refused(script):
    script.require_setuptools("77.0.1")
    with pytest.raises(SystemExit, match=r"setuptools is 65\.5\.0, but must be 77 or later: pip install -U setuptools"):
        script.require_setuptools("65.5.0")


# What is here ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (None, "torch was not in the build environment; where torch is, pip install --no-build-isolation ."),
        (torch("2.9.1"), r"torch 2\.9\.1 is older than 2\.10; upgrade torch"),
    ],
)
def test_a_torch_that_nothing_can_be_built_for(script, monkeypatch, found, sentence):
    if found is None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
            monkeypatch.delitem(sys.modules, name)

        class Blocker:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == "torch":
                    raise ModuleNotFoundError("No module named 'torch'", name="torch")

        monkeypatch.setattr(sys, "meta_path", [Blocker, *sys.meta_path])
    else:
        monkeypatch.setitem(sys.modules, "torch", found)
    with pytest.raises(script.NotBuiltError, match=sentence):
        script.import_torch()


@pytest.mark.parametrize(
    ("found", "home", "output", "sentence"),
    [
        (torch("2.13.0+cpu", cuda=None), None, "", r"torch 2\.13\.0\+cpu has no CUDA; install a CUDA build of torch"),
        (torch("2.13.0+rocm7", None, "7.0"), None, "", "for AMD GPUs, and the kernels are for NVIDIA's"),
        (torch(), None, "", "nvcc was not found; install CUDA 13.0's toolkit or set CUDA_HOME"),
        (torch(), "/opt/cuda", "", "the nvcc of the toolkit in /opt/cuda does not run; set CUDA_HOME"),
        (
            torch(),
            "/opt/cuda",
            "Cuda compilation tools, release 12.8, V12.8.93",
            r"nvcc is of CUDA 12\.8, and torch 2\.13\.0\+cu130 of CUDA 13\.0; install a toolkit of CUDA 13",
        ),
    ],
)
def test_a_cuda_that_nothing_can_be_built_with(script, found, home, output, sentence):
    with pytest.raises(script.NotBuiltError, match=sentence):
        script.check_cuda(found, home, lambda command: (0, output))


def test_another_minor_version_of_cuda_is_fine(script):
    output = "Cuda compilation tools, release 13.1, V13.1.2"
    assert script.check_cuda(torch(), "/opt/cuda", lambda command: (0, output)) == "13.1"


@pytest.mark.parametrize(
    ("supported", "chosen"),
    [
        ("sm_75\nsm_80\nsm_86\nsm_90\nsm_100\nsm_120\n", "8.0;9.0a;10.0+PTX"),
        ("sm_75\nsm_80\nsm_90\n", "8.0;9.0a;9.0+PTX"),
        ("sm_80\n", "8.0+PTX"),
    ],
)
def test_architectures_are_those_that_nvcc_knows_and_ptx_that_runs_on_later_ones(script, supported, chosen):
    assert script.architectures(supported) == chosen


def test_a_toolkit_that_knows_no_gpu_of_ours(script):
    with pytest.raises(script.NotBuiltError, match=r"nvcc knows none of the architectures 8\.0, 9\.0a, 10\.0; install"):
        script.architectures("sm_70\n")


def test_without_a_compiler(script):
    with pytest.raises(
        script.NotBuiltError, match=r"there is no C\+\+ compiler \(no-such-compiler does not run\); inst"
    ):
        script.compiler_name(["no-such-compiler"])


@pytest.mark.parametrize(
    ("headline", "status", "answer"),
    [
        ("g++ (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0\nCopyright", 0, "GCC 13.3.0"),
        ("Apple clang version 17.0.0 (clang-1700.0.13.3)\n", 0, "Clang 17.0.0"),
        (
            "c++ (GCC) 4.8.5 20150623 (Red Hat 4.8.5-44)",
            1,
            r"GCC 4\.8\.5 does not compile C\+\+17 \(error: no c\+\+17\)",
        ),
    ],
)
def test_compilers_have_a_name_and_must_know_c17(script, monkeypatch, headline, status, answer):
    answers = {"--version": (0, headline), "-": (status, "note\nerror: no c++17\n")}
    monkeypatch.setattr(script, "run", lambda command, given="": answers[command[-1]])
    monkeypatch.setattr(script.Path, "is_file", lambda path: True)
    if status == 0:
        assert script.compiler_name(["c++"]) == answer
        monkeypatch.setattr(script.Path, "is_file", lambda path: False)
        answer = r"the headers of this Python are not installed \(there is no Python\.h\)"
    with pytest.raises(script.NotBuiltError, match=answer):
        script.compiler_name(["c++"])


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("[1/2] c++ -c a.cpp\na.cpp:3:1: warning: w\na.cpp:4:35: error: e\na.cpp:5: error: f", "a.cpp:4:35: error: e"),
        ("a.cpp(7): error C2039: no member", "a.cpp(7): error C2039: no member"),
        ("/usr/bin/ld: cannot find -lc10\ncollect2: error: ld returned 1", "/usr/bin/ld: cannot find -lc10"),
        (f"{os.getcwd()}{os.sep}csrc/a.cpp:1:2: error: e", "csrc/a.cpp:1:2: error: e"),
        ("one\ntwo\n\n", "two"),
        ("", "it says nothing"),
    ],
)
def test_the_first_error_of_a_compiler(script, output, line):
    assert script.first_error(output) == line


def test_what_a_build_raises_tells_more_than_its_last_line(script):
    assert script.first_error("building\n", "Unknown CUDA arch") == "Unknown CUDA arch"
    assert script.first_error("a.cpp:1: error: e\n", "Error compiling objects") == "a.cpp:1: error: e"


def test_sources_have_distinct_names():
    # torch's build makes a.o of a.cpp and of a.cu.
    for folder in (ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda"):
        stems = [path.stem for path in folder.glob("*.c*") if path.suffix in (".cpp", ".cu")]
        assert len(stems) == len(set(stems))


# Wheels ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """A small copy of the sources, in which an earlier build left what a wheel would pack."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("rsa_kernels/__init__.py", "rsanet/__init__.py", "csrc/cpu/broken.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / "rsanet" / "__init__.py", tmp_path / "rsanet")  # the version is in it
    left = tmp_path / "build" / "lib" / "rsa_kernels" / "_cpp.abi3.so"
    left.parent.mkdir(parents=True)
    left.touch()
    return tmp_path


def build_wheel(project, **variables):
    program = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_CUDA", "FORCE_CPU", "CXX")}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=project,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def check_is_pure(project):
    (wheel,) = (project / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert not [name for name in names if name.endswith((".so", ".pyd"))]
        assert b"Root-Is-Purelib: true" in archive.read(next(name for name in names if name.endswith("/WHEEL")))
        return json.loads(archive.read("rsa_kernels/_built.json"))


def test_nothing_is_built_or_left_where_nothing_is_asked_for(project):
    done = build_wheel(project, RSA_BUILD_EXT="0")
    assert "rsa_kernels._cpp: not built: RSA_BUILD_EXT was 0; without it, pip install" in done.stdout, done.stderr
    assert check_is_pure(project)["cuda"]["cause"] == "RSA_BUILD_EXT was 0"


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_what_does_not_compile_gives_a_pure_wheel_or_an_error(project):
    (project / "csrc" / "cpu" / "broken.cpp").write_text("#error broken on purpose\n")
    done = build_wheel(project)
    assert "\nrsa_kernels._cpp: not built: it does not compile with " in done.stdout, done.stdout + done.stderr
    assert "csrc/cpu/broken.cpp:1:2: error: #error broken on purpose" in check_is_pure(project)["cpp"]["cause"]
    shutil.rmtree(project / "dist")
    done = build_wheel(project, RSA_BUILD_EXT="1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "error: rsa_kernels._cpp was asked for, but is not built: it does not compile with "
    )
    assert not list(project.glob("dist/*"))
