"""One damped Gauss-Newton step by hand: from an objective to new parameters, and what the step was worth."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import curvlib
from curvlib import GGN
from curvlib.approximations import KFAC, Exact
from curvlib.solvers import CG, QuadraticModel, ResidualTest, damped_inverse

DAMPING = 0.1


def main() -> None:
    """Take the same step by conjugate gradients on the exact matrix and by K-FAC, and a gradient step beside them."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = load_digits(return_X_y=True)
    batch = torch.tensor(images / 16.0, dtype=torch.float32, device=device), torch.tensor(labels, device=device)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).to(device)

    # What is minimised, evaluated once: one forward pass serves the value, the gradient and every curvature.
    objective = curvlib.Objective(model, nn.CrossEntropyLoss(), l2=1e-4)
    evaluation = objective.at(batch)
    gradient = evaluation.gradient()
    print(f"{objective.layout.size} parameters, loss {float(evaluation.value):.4f}")

    # The exact Gauss-Newton matrix exists through its products alone; conjugate gradients invert it.
    exact = Exact(GGN()).estimate(evaluation)
    solution = CG(max_iterations=500, stop=ResidualTest(relative=1e-4))(exact, DAMPING).solve(-gradient)
    print(solution)

    # K-FAC keeps two small matrices a layer, whose Kronecker product is inverted directly.
    kronecker = KFAC(GGN()).estimate(evaluation)
    kfac_step = -(damped_inverse(kronecker, DAMPING) @ gradient)

    # A gradient step gets the best length that the exact quadratic model can give it.
    model_of_loss = QuadraticModel(value=evaluation.value, gradient=gradient, curvature=exact, damping=DAMPING)
    gradient_step = model_of_loss.minimise_over(-gradient.unsqueeze(1)).step

    # The exact step is the minimum of the damped model, by construction; the undamped model forecasts the loss.
    print(f"{'step':<20}{'damped model':>14}{'model':>9}{'loss':>9}")
    theta = objective.parameter_vector()
    for name, step in (("exact Gauss-Newton", solution.x), ("K-FAC", kfac_step), ("gradient", gradient_step)):
        predicted = model_of_loss.predict(step)
        actual = float(evaluation.value_at(theta + step) - evaluation.value)
        print(f"{name:<20}{predicted.damped:>14.4f}{predicted.undamped:>9.4f}{actual:>9.4f}")

    # Until here nothing has touched the model. Writing makes the evaluation stale: it refuses to answer from now on.
    objective.layout.write(objective.parameters, theta + solution.x)
    print(f"loss after the exact step: {float(objective.value(batch)):.4f}")


if __name__ == "__main__":
    main()
