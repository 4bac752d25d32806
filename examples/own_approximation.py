"""An approximation of one's own, with every solver and in a comparison: K-FAC whose two factors are diagonals."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from curvlib import GGN, Objective
from curvlib import experiments as lab
from curvlib.approximations import Exact, LayerwiseApproximation, Statistics, layer_key
from curvlib.operators import Diagonal, Kronecker
from curvlib.solvers import CG, MINRES, FactoredTikhonov, damped_inverse, eigendecompose


@dataclass(frozen=True)
class DiagonalFactors(LayerwiseApproximation):
    """Block of a layer = diag(sum g^2) (x) diag(E[a^2]): memory d_out + d_in in place of d_out^2 + d_in^2."""

    def accumulate(self, factors, means, sums):
        (part,) = factors.maps
        inputs, outputs = layer_key(factors.layer, "a^2"), layer_key(factors.layer, "g^2")
        means[inputs] = part.a.square().mean((0, 1, 2))
        sums[outputs] = sums.get(outputs, 0) + part.g.square().sum((0, 1, 2))

    def zeros(self, layer, like):
        (part,) = layer.maps
        means = {layer_key(layer, "a^2"): like.new_zeros(part.columns)}
        return Statistics(means=means, sums={layer_key(layer, "g^2"): like.new_zeros(part.d_out)})

    def block(self, layer, statistics):
        g2, a2 = statistics.sums[layer_key(layer, "g^2")], statistics.means[layer_key(layer, "a^2")]
        return Kronecker((Diagonal(g2), Diagonal(a2)))

    def describe_block(self, layer):
        return "product of two diagonals"


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    objective = Objective(model, nn.CrossEntropyLoss())
    evaluation = objective.at((torch.randn(200, 10), torch.randint(3, (200,))))
    print(objective.describe(DiagonalFactors(GGN())))

    gradient, damping = evaluation.gradient(), 0.1
    C, exact = DiagonalFactors(GGN()).estimate(evaluation), Exact(GGN()).estimate(evaluation)
    solvers = {
        "by structure": damped_inverse,
        "eigenvalues first": lambda C, damping: damped_inverse(eigendecompose(C), damping),
        "factored damping": FactoredTikhonov(),
        "conjugate gradients": CG(),
        "MINRES": MINRES(),
        "preconditioning exact": lambda C, damping: CG(preconditioner=damped_inverse(C, damping))(exact, damping),
    }
    for name, solver in solvers.items():
        step = -(solver(C, damping) @ gradient)
        change = float(evaluation.value_at(objective.parameter_vector() + step) - evaluation.value)
        print(f"{name:24}{change:8.4f}")

    lab.APPROXIMATIONS.register("diagonal-factors", DiagonalFactors)  # from here on `curvlib compare` knows the name
    problem = lab.PROBLEMS.get("digits-classifier")
    method = lab.configure("kfac", problem, {}).with_curvature(lab.CurvatureChoice(approximation="diagonal-factors"))
    comparison = lab.Comparison(
        problem=problem, methods=(method, lab.configure("sgd", problem, {})), budget=lab.Steps(40)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = lab.ResultsFolder(Path(name) / "results")
        lab.prepare_folder(comparison, folder)
        for record in lab.compare(comparison, problem.load(), folder).records:
            if record.step == 40:
                print(f"{record.method:24}{record.loss:8.4f} training loss after 40 steps")
