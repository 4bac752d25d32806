"""Nonlinear regression by Levenberg-Marquardt: parameters, standard errors, and how many certified digits they have."""

import torch
from torch import nn

import curvlib
from curvlib import GGN
from curvlib.approximations import Dense
from curvlib.optimizers import Tolerances, levenberg_marquardt, minimize
from curvlib.solvers import damped_inverse

# Rat42 of the NIST Statistical Reference Datasets: pasture yield against growing time.
TIME = [9.0, 14.0, 21.0, 28.0, 42.0, 57.0, 63.0, 70.0, 79.0]
YIELD = [8.93, 10.8, 18.59, 22.33, 39.35, 56.11, 61.73, 64.62, 67.08]
START = [100.0, 1.0, 0.1]
CERTIFIED = [7.2462237576e01, 2.6180768402e00, 6.7359200066e-02]
CERTIFIED_ERRORS = [1.7340283401e00, 8.8295217536e-02, 3.4465663377e-03]


class Growth(nn.Module):
    """y = b1 / (1 + exp(b2 - b3 x))."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor(START, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the predictions."""
        return self.b[0] / (1 + torch.exp(self.b[1] - self.b[2] * x))


def digits(values: torch.Tensor, certified: list[float]) -> torch.Tensor:
    """Return how many digits are right, -log10 of the relative error; certified values have 11."""
    exact = torch.tensor(certified, dtype=torch.float64)
    return -((values - exact).abs() / exact.abs()).clamp(min=1e-11).log10()


def main() -> None:
    """Fit the curve and print parameters, standard errors and certified digits."""
    x, y = (torch.tensor(column, dtype=torch.float64) for column in (TIME, YIELD))
    model = Growth()
    objective = curvlib.Objective(model, nn.MSELoss(reduction="sum"))  # |r|^2

    result = minimize(
        levenberg_marquardt(objective),
        (x, y),
        tolerances=Tolerances(ftol=0.0, xtol=1e-14, gtol=0.0),  # to the last digit; the default is 1e-8
    )
    print(result)

    # Covariance s^2 (J^T J)^-1 with s^2 = |r|^2 / (N - D). The Gauss-Newton matrix of |r|^2 is C = 2 J^T J.
    C = Dense(GGN()).estimate(objective.at((x, y)))
    variance = result.value / (len(y) - C.size)
    covariance = 2 * variance * damped_inverse(C, 0.0).to_dense()
    errors = covariance.diagonal().sqrt()

    print(f"{'':<4}{'estimate':>16}{'digits':>8}{'standard error':>18}{'digits':>8}")
    b = model.b.detach()
    table = torch.stack([b, digits(b, CERTIFIED), errors, digits(errors, CERTIFIED_ERRORS)], dim=1)
    for number, (estimate, right, error, right_of_error) in enumerate(table.tolist(), 1):
        print(f"b{number:<3}{estimate:>16.10g}{right:>8.1f}{error:>18.10g}{right_of_error:>8.1f}")
    print(f"residual standard deviation {variance**0.5:.10g}")


if __name__ == "__main__":
    main()
