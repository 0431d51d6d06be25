"""A sandbox that holds: hostile code runs in it, and its verdict is made outside."""

from fastrl.rewards.sandbox.cases import CallTest, Grade, Limits, ScriptTest, Status, StdinTest, Test
from fastrl.rewards.sandbox.grade import default_sandbox, grade, grade_in
from fastrl.rewards.sandbox.sandbox import Sandbox

__all__ = [
    "CallTest",
    "Grade",
    "Limits",
    "Sandbox",
    "ScriptTest",
    "Status",
    "StdinTest",
    "Test",
    "default_sandbox",
    "grade",
    "grade_in",
]
