"""Differentiable functions with several implementations; `fastrl.ops.backend` says which one runs."""

from fastrl.ops.backend import use_backend as use_backend
from fastrl.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from fastrl.ops.linear_logprob import linear_logprob as linear_logprob
from fastrl.ops.linear_token_loss import TokenLoss as TokenLoss
from fastrl.ops.linear_token_loss import linear_token_loss as linear_token_loss
from fastrl.ops.logits_logprob import logits_logprob as logits_logprob
from fastrl.ops.token_stats import TokenStats as TokenStats
