"""A text encoder, the mean of its token vectors, and a linear head.

Sentence encoders are trained so that this mean carries the meaning; their first token does not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["MeanPooledClassifier", "mean_pool"]


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are no padding.

    Args:
        hidden: token vectors (N, L, D).
        mask: 1 for tokens, 0 for padding (N, L).

    Returns:
        (N, D).

    Example:
        >>> import torch
        >>> mean_pool(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[1, 1, 0]])).tolist()
        [[3.0]]
    """
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


class MeanPooledClassifier(nn.Module):
    """Encoder, mean over tokens, dropout, linear head.

    Args:
        backbone: a Hugging Face encoder.
        classes: outputs of the head.
        dropout: probability, [0, 1).
    """

    def __init__(self, backbone: Any, classes: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(backbone.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Scores (N, classes) of token ids (N, L)."""
        found = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        pooled = mean_pool(found.last_hidden_state, attention_mask)  # (N, D)
        return self.classifier(self.dropout(pooled))
