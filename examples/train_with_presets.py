"""Train a classifier of 8x8 digits with the two presets, and with Adam beside them."""

from collections.abc import Callable
from time import perf_counter

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import curvlib

EXAMPLES, TEST_EXAMPLES, BATCH = 1500, 297, 500
EPOCHS = 10


def digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 1797 images (N, 64) in [0, 1] and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16.0, dtype=torch.float32, device=device), torch.tensor(labels, device=device)


def with_adam(objective: curvlib.Objective) -> Callable[[tuple[Tensor, Tensor]], object]:
    """Return a function that takes one step of PyTorch's Adam on a batch."""
    optimizer = torch.optim.Adam(objective.parameters, lr=1e-2, weight_decay=objective.l2)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(objective.model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


# A preset's `step` takes the batch itself: it decides how many forward and backward passes it needs.
METHODS = {
    "kfac": lambda objective: curvlib.optimizers.kfac(objective).step,
    "hessian_free": lambda objective: curvlib.optimizers.hessian_free(objective).step,
    "torch Adam": with_adam,
}


def main() -> None:
    """Train with each method for the same number of passes over the data from the same initial parameters."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = digits(device)
    train, test = (images[:EXAMPLES], labels[:EXAMPLES]), (images[EXAMPLES:], labels[EXAMPLES:])
    print(f"{'method':<14}{'training loss':>15}{'test accuracy':>15}{'seconds':>9}")
    for name, start in METHODS.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 50), nn.Tanh(), nn.Linear(50, 20), nn.Tanh(), nn.Linear(20, 10)).to(device)
        objective = curvlib.Objective(model, nn.CrossEntropyLoss(), l2=1e-4)
        step, began = start(objective), perf_counter()
        for _ in range(EPOCHS):
            for chosen in torch.randperm(EXAMPLES, device=device).split(BATCH):
                step((train[0][chosen], train[1][chosen]))
        seconds = perf_counter() - began
        loss = float(objective.value(train))
        with torch.no_grad():
            accuracy = float((model(test[0]).argmax(1) == test[1]).float().mean())
        print(f"{name:<14}{loss:>15.4f}{accuracy:>15.3f}{seconds:>9.2f}")


if __name__ == "__main__":
    main()
