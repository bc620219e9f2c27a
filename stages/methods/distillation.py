"""Learning from a teacher's outputs.

Soft: Hinton, Vinyals & Dean 2015, KL between softened outputs times T^2. Hard: Touvron et al., DeiT (ICML 2021), eq.
3, cross-entropy with the teacher's decision. Shapes: logits (B, K).
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
