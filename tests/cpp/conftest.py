"""Everything here needs the C++ extension, which is built wherever there is a compiler."""

import pytest

from rsa_kernels import native


def pytest_collection_modifyitems(items):
    reason = native.missing("cpp")
    for item in items:
        if reason and "tests/cpp/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=f"the cpp backend {reason}"))
