"""pytest's hooks and fixtures, defined in session.py: mypy accepts a single conftest module, that of tests/."""

from session import (  # noqa: F401
    bench,
    pytest_addoption,
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_terminal_summary,
)
