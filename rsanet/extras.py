"""How the optional packages are installed. Imports nothing."""


def install(extra: str) -> str:
    """The command that brings an extra: the package is in no index, so it is run where the sources are."""
    return f'pip install ".[{extra}]", in the folder of rsanet\'s sources'
