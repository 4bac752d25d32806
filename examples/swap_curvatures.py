"""One network, many curvatures: how far is the damped step of each approximation from the exact one?"""

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import curvlib
from curvlib import GGN, EmpiricalFisher, Fisher
from curvlib.approximations import KFAC, Approximation, BlockDiagonal, Dense, Diagonal, Identity
from curvlib.operators import LinearOperator
from curvlib.solvers import FactoredTikhonov, damped_inverse

DAMPING = 0.1

# Any matrix goes with any approximation, any approximation with any solver.
CURVATURES: dict[str, tuple[Approximation, Callable[..., LinearOperator]]] = {
    "exact GGN": (Dense(GGN()), damped_inverse),
    "blocks of the GGN": (BlockDiagonal(GGN()), damped_inverse),
    "K-FAC, GGN": (KFAC(GGN()), damped_inverse),
    "K-FAC, GGN, factored": (KFAC(GGN()), FactoredTikhonov()),
    "K-FAC, Fisher": (KFAC(Fisher(samples=1)), damped_inverse),
    "K-FAC, empirical": (KFAC(EmpiricalFisher()), damped_inverse),
    "diagonal of the GGN": (Diagonal(GGN()), damped_inverse),
    "identity": (Identity(), damped_inverse),
}


def a_little_trained(device: torch.device) -> tuple[curvlib.Objective, tuple[Tensor, Tensor]]:
    """Return a small classifier of 8x8 digits after some steps, so that its curvature has structure, and a batch."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    batch = torch.tensor(images / 16.0, dtype=torch.float64, device=device), torch.tensor(labels, device=device)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10))
    objective = curvlib.Objective(model.to(device, torch.float64), nn.CrossEntropyLoss())
    optimizer = torch.optim.Adam(objective.parameters, lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(objective.model(batch[0]), batch[1]).backward()
        optimizer.step()
    return objective, batch


def main() -> None:
    """Print, for each curvature, the error and the cosine of its step and the change of the loss that it makes."""
    objective, batch = a_little_trained(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    evaluation = objective.at(batch)
    gradient, theta = evaluation.gradient(), objective.parameter_vector()
    print(f"{objective.layout.size} parameters, loss {float(evaluation.value):.4f}, damping {DAMPING}")
    print(f"{'curvature':<22}{'error':>8}{'cosine':>8}{'change of loss':>16}")

    exact = -(damped_inverse(Dense(GGN()).estimate(evaluation), DAMPING) @ gradient)
    for name, (approximation, solver) in CURVATURES.items():
        step = -(solver(approximation.estimate(evaluation), DAMPING) @ gradient)
        error = float((step - exact).norm() / exact.norm())
        cosine = float(step @ exact / (step.norm() * exact.norm()))
        change = float(evaluation.value_at(theta + step) - evaluation.value)
        print(f"{name:<22}{error:>8.3f}{cosine:>8.3f}{change:>16.4f}")


if __name__ == "__main__":
    main()
