from __future__ import annotations

from fastrl.report import VERL_NAMES, with_verl_names


def test_names_verl_knows_are_translated_and_others_kept():
    metrics = {"reward": 0.5, "step_time": 2.0, "rewards/numeric/mean": 0.25}
    assert with_verl_names(metrics) == {"critic/score/mean": 0.5, "timing_s/step": 2.0, "rewards/numeric/mean": 0.25}


def test_no_two_metrics_share_a_verl_name():
    assert len(set(VERL_NAMES.values())) == len(VERL_NAMES)
