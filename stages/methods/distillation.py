"""Learning from a teacher's outputs and from its hidden states.

Soft: Hinton, Vinyals & Dean 2015, KL between softened outputs times T^2. Hard: Touvron et al., DeiT (ICML 2021), eq.
3, cross-entropy with the teacher's decision. Features: hints, Romero et al., FitNets (ICLR 2015), eq. 3, with a linear
map to the teacher's width as in TinyBERT (Jiao et al. 2020, eq. 8) and ViTKD (Yang et al. 2022), between tokens that
are standardised, as Wei et al. 2022 do with the teacher's ("feature distillation", 3.2). Shapes: logits (B, K), hidden
states (B, T, C).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) at temperature T, mean over the batch."""
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def hard_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student with the teacher's top class."""
    return F.cross_entropy(student, teacher.argmax(-1))


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of hidden states (B, T, C) of one width, () over channels, tokens and images.

    Each token is first standardised over its channels, as the LayerNorm does through which the next block reads it, so
    that scales, which grow from block to block, do not count: with r the correlation of a student's and a teacher's
    token, it is 2 - 2r. 0 where they say the same, 2 where they have nothing to do with each other.
    """
    return F.mse_loss(_standardised(student), _standardised(teacher))


def _standardised(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
