"""A Python interpreter as a tool: each program runs alone in the sandbox of the code reward, and its output is read."""

from __future__ import annotations

from dataclasses import asdict

from fastrl.rewards.sandbox import Limits, default_sandbox


class Python:
    """Runs programs in the sandbox.

    Args:
        seconds, memory_mib: limits of one program.
        strict: refuse unless every layer of the sandbox holds.
        characters: most of a program's output that the model is shown.
    """

    def __init__(
        self, *, seconds: float = 5.0, memory_mib: int = 1024, strict: bool = True, characters: int = 2000
    ) -> None:
        self._limits = asdict(Limits(seconds=seconds, memory_mib=memory_mib))
        self._sandbox = default_sandbox(strict=strict)
        self._characters = characters

    def python(self, code: str) -> str:
        """
        Runs a Python program and shows what it prints.

        Args:
            code: The program. Nothing is kept from one program to the next.

        Returns:
            What it printed.
        """
        job = {"role": "program", "source": code, "stdin": "", "limits": self._limits}
        outcome = self._sandbox.run(job)
        if outcome["status"] == "INFRA":
            raise RuntimeError("the interpreter is not available")
        if outcome["status"] != "DONE":
            raise ValueError(f"{outcome['status'].lower()}: {outcome['detail']}")
        shown = str(outcome["stdout"])
        return shown if len(shown) <= self._characters else f"{shown[: self._characters]}..."
