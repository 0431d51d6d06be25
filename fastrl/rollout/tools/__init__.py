"""Tools that come with fastrl; each is a function or a class with TRL's typed docstrings, and runs in a worker."""

from fastrl.rollout.tools.calculator import calculator
from fastrl.rollout.tools.search import Search

__all__ = ["Search", "calculator"]
