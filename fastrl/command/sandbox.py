"""`fastrl env sandbox`: which layers of the sandbox this machine has, and whether each of them holds."""

from __future__ import annotations


def run() -> int:
    """Print a line for each layer, and what `grade` will do; 0 when every layer holds."""
    from fastrl.rewards.sandbox.layers import found_layers, missing_layers
    from fastrl.rewards.sandbox.sandbox import run_once, usable_layers
    from fastrl.rewards.sandbox.self_test import self_test

    try:
        layers = found_layers()
    except RuntimeError as error:
        print(f"python    {error}")
        return 1
    missing = missing_layers(layers)
    leaks = self_test(layers, run_once)
    print(f"{'python':<10}{layers.python}")
    for name in ("uid", "bwrap", "landlock", "seccomp", "rlimits"):
        if name in missing:
            print(f"{name:<10}missing: {missing[name]}")
        elif "start" in leaks:
            print(f"{name:<10}unknown")
        else:
            print(f"{name:<10}{'leaks: ' + ', '.join(leaks[name]) if name in leaks else 'holds'}")
    if "start" in leaks:
        print(f"{'start':<10}{leaks['start'][0]}")
    for label, strict in (("strict", True), ("weaker", False)):
        try:
            off = missing_layers(usable_layers(layers, strict=strict))
            print(f"{label:<10}works" + (f" without {', '.join(off)}" if off else ""))
        except RuntimeError as error:
            print(f"{label:<10}refuses: {error}")
    return 1 if missing or leaks else 0
