"""Random weights for models of transformers that show what fresh ones hide."""

from typing import Any


def randomize(model: Any) -> None:
    """Weights that leave nothing neutral: fresh norms are ones, fresh matrices so small that layers hardly matter."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 2.0)
            elif parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(std=0.3)
