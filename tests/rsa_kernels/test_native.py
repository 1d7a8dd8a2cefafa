"""The compiled extensions load when they are asked about, and say in a sentence why they do not."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import machinery

import pytest
import torch

from rsa_kernels import native

SUFFIX = machinery.EXTENSION_SUFFIXES[-1]
FACTS = {"torch": "2.12.0", "platform": "linux-x86_64", "compiler": "GCC 12.2.0"}


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """Takes the place of the C++ extension: its folder, its name, and its note."""

    class Extension:
        folder, name = tmp_path, "rsa_stand_in"
        library = tmp_path / f"rsa_stand_in{SUFFIX}"

        def note(self, text):
            (tmp_path / "_built.json").write_text(text if isinstance(text, str) else json.dumps({"cpp": text}))
            native._notes.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(native._EXTENSIONS, "cpp", ("C++", Extension.name))
    monkeypatch.setattr(native, "_NOTE", tmp_path / "_built.json")
    monkeypatch.setattr(native, "_reasons", {})
    native._notes.cache_clear()
    yield Extension()
    sys.modules.pop(Extension.name, None)
    native._notes.cache_clear()


@pytest.mark.parametrize(
    ("note", "sentence"),
    [
        (
            {"cause": "there is no C++ compiler", "remedy": "install one"},
            "needs the C++ extension, which was not built (there is no C++ compiler): install one",
        ),
        (
            FACTS,
            "needs the C++ extension, which was built for torch 2.12.0 with GCC 12.2.0 on linux-x86_64 and is not "
            "here: pip install --no-build-isolation .",
        ),
        (
            None,
            "needs the C++ extension, which was not built: pip install --no-build-isolation . with a C++17 compiler",
        ),
    ],
)
def test_an_absent_extension(extension, note, sentence):
    extension.note(note)
    assert native.missing("cpp") == sentence


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"cpp": 3}', "\xff"])
def test_a_note_that_cannot_be_read_is_no_note(extension, text):
    extension.note(text)
    assert native.missing("cpp").startswith("needs the C++ extension, which was not built: pip install")


def test_a_corrupt_library(extension):
    extension.library.write_bytes(b"not a library" * 99)
    extension.note(FACTS)
    reason = native.missing("cpp")
    assert reason.startswith(
        f"was built for torch 2.12.0 with GCC 12.2.0 on linux-x86_64 and does not load with torch {torch.__version__} ("
    )
    assert reason.endswith("): build it again with pip install --no-build-isolation .")
    assert "\n" not in reason


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs a C compiler on Linux")
def test_a_library_for_another_torch(extension):
    source = extension.folder / "stale.c"
    source.write_text("void gone_from_torch(void); void *PyInit_rsa_stand_in(void) { gone_from_torch(); return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", extension.library], check=True)
    extension.note(FACTS)
    assert f"does not load with torch {torch.__version__} (undefined symbol: gone_from_torch): build" in native.missing(
        "cpp"
    )


def test_a_library_that_fails_while_it_loads(extension):
    (extension.folder / f"{extension.name}.py").write_text("raise RuntimeError('registered twice\\nat line 3')")
    assert native.missing("cpp") == (
        f"was built, but does not load with torch {torch.__version__} (registered twice): build it again with "
        "pip install --no-build-isolation ."
    )


def test_a_module_that_the_library_needs_is_not_taken_for_it(extension):
    (extension.folder / f"{extension.name}.py").write_text("import rsa_needed_by_the_stand_in")
    assert "does not load with torch" in native.missing("cpp")


def test_threads_load_once_and_answers_are_kept(extension):
    module = extension.folder / f"{extension.name}.py"
    module.write_text("import builtins, time; time.sleep(0.2); builtins.rsa_loads.append(1)")
    import builtins

    builtins.rsa_loads = []
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(native.missing, ["cpp"] * 8)) == [None] * 8
        assert builtins.rsa_loads == [1]
        assert native.missing("cpp") is None
        assert builtins.rsa_loads == [1]
    finally:
        del builtins.rsa_loads


def test_a_failure_is_not_tried_again(extension):
    extension.library.write_bytes(b"not a library")
    first = native.missing("cpp")
    extension.library.unlink()
    assert native.missing("cpp") is first


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_importing_the_package_loads_no_extension_and_a_forked_child_answers_as_its_parent():
    program = """
import os, sys
import rsa_kernels
from rsa_kernels import native
loaded = [name for name in sys.modules if name.startswith("rsa_kernels._c")]
assert not loaded, loaded
def answers():
    return [native.missing("cpp"), native.missing("cuda")]
child = os.fork()
if child == 0:
    print(answers(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(answers())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
