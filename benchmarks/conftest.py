"""What pytest looks for here; it stands in session.py, as mypy takes one conftest only, and tests/ has it."""

from session import (  # noqa: F401
    bench,
    pytest_addoption,
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_terminal_summary,
)
