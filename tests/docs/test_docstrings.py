"""Every public name says what it takes, what it gives, and what it refuses."""

import inspect
from importlib import import_module

import pytest

PUBLIC = [
    (package, name)
    for package in ("rsa_kernels", "rsanet", "rsanet.segment")
    for name in import_module(package).__all__
]


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_a_public_name_documents_its_arguments_and_errors(package, name):
    described = getattr(import_module(package), name)
    text = inspect.getdoc(described)
    arguments = inspect.signature(described).parameters
    assert [argument for argument in arguments if f"{argument}:" not in text] == []
    assert not arguments or "Raises:" in text
