"""The TRL example learns, and its three ways learn the same."""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "integrations" / "trl_grpo.py"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed (tests/hosts has it)")
def test_the_three_ways_have_the_same_rewards(capsys):
    spec = spec_from_file_location("trl_grpo", EXAMPLE)
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in printed if line.strip()[:2].strip().isdigit()]
    assert len(rows) == 10
    assert all(plain == patched == packed for _, plain, patched, packed in rows)
    assert float(rows[-1][1]) > float(rows[0][1]) + 0.3
