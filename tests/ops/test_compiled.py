"""A compiled training step around the waist: no graph break where the op declares itself, the same gradients."""

from __future__ import annotations

import pytest
import torch

from fastrl.ops import Lora, linear_cross_entropy, linear_logprob, linear_token_loss
from fastrl.testing import linear_logprob_inputs

N, D, V = 19, 8, 101
ROWS = torch.linspace(0.5, 2.0, N)


def logprob(hidden, weight, bias, a, b, target):
    stats = linear_logprob(
        torch.tanh(hidden), weight, target, bias=bias, lora=Lora(a, b, 0.5), temperature=ROWS, softcap=3.0
    )
    return (2 * stats.logprob - 0.1 * stats.entropy).sum()


def plain_logprob(hidden, weight, bias, a, b, target):
    return linear_logprob(torch.tanh(hidden), weight, target, valid_vocab=90, chunk_rows=5).logprob.sum()


def cross_entropy(hidden, weight, bias, a, b, target):
    options = {"bias": bias, "lora": Lora(a, b), "temperature": 0.7, "label_smoothing": 0.1, "z_loss": 1e-2}
    return 2 * linear_cross_entropy(torch.tanh(hidden), weight, target, token_weight=ROWS, **options)


def token_loss(hidden, weight, bias, a, b, target):
    def per_row(logprob, entropy, rows):
        return -logprob - 0.1 * entropy

    return 2 * linear_token_loss(torch.tanh(hidden), weight, target, per_row, bias=bias, row_weight=ROWS).loss


def inputs(dtype):
    hidden, weight, target = linear_logprob_inputs(N, D, V, dtype=dtype)
    bias, a, b = torch.linspace(-1, 1, V), hidden[:2], torch.linspace(-1, 1, 2 * V).reshape(V, 2)
    return [x.to(dtype) for x in (hidden, weight, bias, a, b)], (target % 90).index_fill(0, target[:1] * 0, -100)


def gradients(step, dtype, frozen):
    tensors, target = inputs(dtype)
    leaves = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate(tensors)]
    loss = step(*leaves, target)
    loss.backward()
    return loss.detach(), [x.grad for x in leaves]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


# Dynamo itself looks at .grad of the tensors that cross a graph break.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("frozen", [(), (1, 2)], ids=["all trained", "frozen head"])
@pytest.mark.parametrize("step", [logprob, plain_logprob, cross_entropy, token_loss])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_compiled_step_has_the_gradients_of_an_eager_one(dtype, step, frozen):
    compiled = torch.compile(step, backend="aot_eager", fullgraph="logprob" in step.__name__)
    for got, expected in zip(gradients(compiled, dtype, frozen), gradients(step, dtype, frozen), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12 if dtype == torch.float64 else 1e-2, atol=1e-12)


@pytest.mark.parametrize("step", [token_loss, cross_entropy])
def test_the_single_pass_breaks_the_graph_once(step):
    tensors, target = inputs(torch.float32)
    assert torch._dynamo.explain(step)(*tensors, target).graph_break_count == 1


def test_other_numbers_of_rows_compile_into_one_more_graph_only():
    graphs = []

    def counting(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda h, w, t: linear_logprob(h, w, t).logprob.sum(), backend=counting, fullgraph=True)
    for n in (5, 7, 9, 11):
        hidden, weight, target = linear_logprob_inputs(n, D, V)
        torch.testing.assert_close(
            compiled(hidden, weight, target), linear_logprob(hidden, weight, target).logprob.sum()
        )
    assert len(graphs) <= 2


def test_the_operator_keeps_the_rules_of_torch_library():
    tensors, target = inputs(torch.float64)
    leaves = [x.clone().requires_grad_() for x in tensors]
    options = (None, 0.7, None, 1.0, 0.5, None, None, False, None)
    torch.library.opcheck(torch.ops.fastrl.linear_logprob.default, (*leaves, target, *options))


def test_a_target_out_of_range_is_still_refused():
    hidden, weight, target = linear_logprob_inputs(4, D, V)
    compiled = torch.compile(lambda h, w, t: linear_logprob(h, w, t).logprob, backend="aot_eager", fullgraph=True)
    with pytest.raises(ValueError, match="below the vocabulary of 101"):
        compiled(hidden, weight, target + V)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("step", [logprob, cross_entropy, token_loss])
def test_main_grad_is_filled_by_a_compiled_step_too(step):
    tensors, target = inputs(torch.float32)
    buffers = []
    for run in (step, torch.compile(step, backend="aot_eager")):
        hidden, weight, *others = (x.clone() for x in tensors)
        weight.requires_grad_().main_grad = torch.ones(V, D)
        run(hidden, weight, *others, target).backward()
        assert weight.grad is None
        buffers.append(weight.main_grad)
    assert buffers[0].std() > 0
    torch.testing.assert_close(*buffers)


def test_a_derivative_of_the_gradient_is_refused():
    hidden, weight, target = linear_logprob_inputs(N, D, V)
    hidden.requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(hidden):
        return linear_logprob(hidden, weight, target).logprob.sum()

    with pytest.raises(RuntimeError, match=r"double backward"):
        torch.autograd.grad(compiled(hidden), hidden, create_graph=True)[0].sum().backward()


def test_a_derivative_of_the_operators_gradient_is_refused():
    hidden, weight, target = linear_logprob_inputs(N, D, V)
    hidden.requires_grad_()
    options = (None, 1.0, None, 1.0, 1.0, None, None, False, None)
    logprob, _, _ = torch.ops.fastrl.linear_logprob(hidden, weight, None, None, None, target, *options)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(logprob.sum(), hidden, create_graph=True)[0].sum().backward()
