"""The rule that picks a backend: the call, then the context, then the machine; never in silence."""

from __future__ import annotations

import pytest
import torch

from fastrl.ops.backend import Implementations, choose, use_backend

PLAIN = Implementations("some_op")
X = torch.zeros(1)


def test_the_call_wins_over_the_context_and_the_context_over_the_machine():
    assert choose(None, X, PLAIN) == "torch"
    with use_backend("reference"):
        assert choose(None, X, PLAIN) == "reference"
        assert choose("torch", X, PLAIN) == "torch"
    assert choose(None, X, PLAIN) == "torch"


def test_contexts_nest_and_end_with_an_exception_too():
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("torch"):
            raise KeyError
        assert choose(None, X, PLAIN) == "reference"
    assert choose(None, X, PLAIN) == "torch"


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one of reference, torch, native, triton, got 'cuda'"):
        choose("cuda", X, PLAIN)
    with pytest.raises(ValueError, match=r"got 'cuda'"), use_backend("cuda"):
        pass


@pytest.mark.parametrize("name", ["triton", "native"])
def test_asking_for_a_backend_the_op_lacks_raises_instead_of_falling_back(name):
    with pytest.raises(RuntimeError, match=f"backend '{name}' of some_op does not exist"):
        choose(name, X, PLAIN)
    with use_backend(name), pytest.raises(RuntimeError, match="does not exist"):
        choose(None, X, PLAIN)


def test_triton_on_a_cpu_tensor_runs_only_when_it_is_interpreted(monkeypatch):
    op = Implementations("some_op", triton="fastrl.kernels.some_op")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", X, op) == "triton"
    assert choose(None, X, op) == "torch"  # never chosen by itself on CPU
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="needs a CUDA tensor, got one on cpu"):
        choose("triton", X, op)


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("fastrl.ops.backend.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="needs the module 'triton', which is not installed"):
        choose("triton", X, Implementations("some_op", triton="fastrl.kernels.some_op"))


def test_native_without_the_extension_or_the_operator_says_which_is_missing(monkeypatch):
    op = Implementations("some_op", native="fastrl::no_such_operator")
    monkeypatch.setattr("fastrl.ops.backend._extension_is_loaded", lambda: False)
    with pytest.raises(RuntimeError, match=r"compiled extension 'fastrl\._C'"):
        choose("native", X, op)
    monkeypatch.setattr("fastrl.ops.backend._extension_is_loaded", lambda: True)
    with pytest.raises(RuntimeError, match="'fastrl::no_such_operator', which this build"):
        choose("native", X, op)
    assert choose(None, X, op) == "torch"


def test_native_is_the_default_on_cpu_where_its_operator_is_registered(monkeypatch):
    monkeypatch.setattr("fastrl.ops.backend._extension_is_loaded", lambda: True)
    assert choose(None, X, Implementations("some_op", native="aten::mm")) == "native"
    meta = torch.zeros(1, device="meta")
    with pytest.raises(RuntimeError, match="was not built for meta tensors"):
        choose("native", meta, Implementations("some_op", native="aten::mm"))
