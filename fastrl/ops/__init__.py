"""Differentiable functions with several implementations; `fastrl.ops.backend` says which one runs."""

from fastrl.ops.backend import use_backend as use_backend
from fastrl.ops.gae import Gae as Gae
from fastrl.ops.gae import gae as gae
from fastrl.ops.group_advantage import Baseline as Baseline
from fastrl.ops.group_advantage import Scale as Scale
from fastrl.ops.group_advantage import group_advantage as group_advantage
from fastrl.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from fastrl.ops.linear_divergence import linear_divergence as linear_divergence
from fastrl.ops.linear_logprob import linear_logprob as linear_logprob
from fastrl.ops.linear_token_loss import TokenLoss as TokenLoss
from fastrl.ops.linear_token_loss import linear_token_loss as linear_token_loss
from fastrl.ops.linear_topk_divergence import TopTokens as TopTokens
from fastrl.ops.linear_topk_divergence import linear_top_tokens as linear_top_tokens
from fastrl.ops.linear_topk_divergence import linear_topk_divergence as linear_topk_divergence
from fastrl.ops.logits_logprob import logits_logprob as logits_logprob
from fastrl.ops.lora import Lora as Lora
from fastrl.ops.reverse_scan import reverse_scan as reverse_scan
from fastrl.ops.token_objective import Kl as Kl
from fastrl.ops.token_objective import TokenObjective as TokenObjective
from fastrl.ops.token_objective import token_objective as token_objective
from fastrl.ops.token_stats import TokenStats as TokenStats
