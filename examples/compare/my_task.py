"""A task of one's own for ``descend compare``: fit a wave.

    descend compare examples/compare/my_task.py --optimizer adamw --optimizer lion --optimizer lbfgs

The module ``descend.compare.tasks.user_file`` says what such a file may hold.
"""

import torch
from torch import nn
from torch.nn.functional import mse_loss

steps = 300
batch_size = 64
lr = 5e-3  # Adam's; the rates of other optimizers follow from it


def task():
    """Return the model, the data (a tenth of them is held out) and the loss."""
    inputs = torch.linspace(-3, 3, 1000).unsqueeze(1)
    targets = torch.sin(2 * inputs) + 0.1 * torch.randn_like(inputs)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    return model, (inputs, targets), mse_loss


def largest_error(outputs, targets):
    """Return the largest error of a held-out target."""
    return (outputs - targets).abs().max()


metric = largest_error
metric_is_error = True
