"""Everything here needs the C++ extension, which is built wherever there is a compiler."""

import pytest
import torch

from rsa_kernels import cpp, native


def pytest_collection_modifyitems(items):
    reason = native.missing("cpp")
    for item in items:
        if reason and "tests/cpp/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=f"the cpp backend {reason}"))


@pytest.fixture(params=("amx", "avx512_bf16", "avx512", "avx2", "plain"))
def instruction_set(request):
    """Every instruction set in turn, where this processor has it."""
    before = cpp.instruction_set()
    try:
        cpp.instruction_set(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield request.param
    cpp.instruction_set(before)


@pytest.fixture
def threads():
    """Sets torch's number of threads; puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
