"""An approximation of one's own, with every solver and in a comparison: K-FAC whose two factors are diagonals."""

import tempfile
from dataclasses import dataclass, replace

import torch
from torch import nn

from curvlib import GGN, Objective
from curvlib import experiments as lab
from curvlib import solvers as by
from curvlib.approximations import Exact, LayerwiseApproximation, Statistics, layer_key
from curvlib.experiments.command_line import main as curvlib_command
from curvlib.operators import Diagonal, Kronecker


@dataclass(frozen=True)
class DiagonalFactors(LayerwiseApproximation):
    """Block of a layer = diag(sum g^2) (x) diag(E[a^2]): memory d_out + d_in in place of d_out^2 + d_in^2."""

    counts_positions = True  # those that padding or an ignored target leaves out are known then

    def refusal(self, layer):
        plain = not any(part.sparse or part.groups > 1 for part in layer.maps)
        return "" if plain and len(layer.maps) == 1 else "it is not one matrix that multiplies vectors"

    def accumulate(self, factors, means, sums):
        (part,), inputs, outputs = factors.maps, layer_key(factors.layer, "a^2"), layer_key(factors.layer, "g^2")
        there = torch.ones_like(part.g[:, :, 0, 0]) if part.valid is None else part.valid.to(part.g.dtype)
        rows = torch.cat([part.a.square().sum((1, 2)), there.sum(1, keepdim=True)], dim=1)
        rows = rows if factors.counted is None else rows[factors.counted]  # the others' targets are ignored
        means[inputs] = rows.sum(0) / max(len(rows), 1)  # a^2 of all positions, and the number of positions
        sums[outputs] = sums.get(outputs, 0) + part.g.square().sum((0, 1, 2))

    def zeros(self, layer, like):
        means = {layer_key(layer, "a^2"): like.new_zeros(layer.maps[0].columns + 1)}
        return Statistics(means=means, sums={layer_key(layer, "g^2"): like.new_zeros(layer.maps[0].d_out)})

    def block(self, layer, statistics):
        g2, a2 = statistics.sums[layer_key(layer, "g^2")], statistics.means[layer_key(layer, "a^2")]
        return Kronecker((Diagonal(g2), Diagonal(a2[:-1] / a2[-1].clamp(min=1e-30))))

    def describe_block(self, layer):
        return "product of two diagonals"


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    objective = Objective(model, nn.CrossEntropyLoss())
    evaluation = objective.at((torch.randn(200, 10), torch.randint(3, (200,))))
    print(objective.describe(DiagonalFactors(GGN())))
    g, damping = evaluation.gradient(), 0.1
    C, exact = DiagonalFactors(GGN()).estimate(evaluation), Exact(GGN()).estimate(evaluation)
    by_layer = torch.cat([torch.full_like(p, 1.0 + i // 2).flatten() for i, p in enumerate(model.parameters())])
    solvers = by.CG(), by.MINRES(), by.FactoredTikhonov(), by.BlockwiseDamping(factors=by_layer), by.DeterminismCheck()
    steps = {type(solver).__name__: -(solver(C, damping) @ g) for solver in solvers}
    steps["damped_inverse"] = -(by.damped_inverse(C, damping) @ g)
    steps["of its eigenvalues"] = -(by.damped_inverse(by.eigendecompose(C), damping) @ g)
    steps["preconditioning exact"] = -(by.CG(preconditioner=by.damped_inverse(C, damping))(exact, damping) @ g)
    free = by.Subproblem(operator=C, gradient=g, damping=damping)
    steps["DampedNewton"] = by.DampedNewton().solve(free).step
    inside = replace(free, radius=0.5 * float(steps["DampedNewton"].norm()))  # a trust region that stops that step
    for descent in (by.Steihaug(), by.Dogleg(), by.MoreSorensen(), by.TwoDimensionalSubspace()):
        steps[type(descent).__name__] = descent.solve(inside).step
    for name, step in steps.items():
        change = float(evaluation.value_at(objective.parameter_vector() + step) - evaluation.value)
        print(f"{name:24}{change:9.4f}{float(step.norm()):9.4f}")

    lab.APPROXIMATIONS.register("diagonal-factors", DiagonalFactors)  # from here on `curvlib compare` knows the name
    command = "compare --problem digits-classifier --method kfac --method newton-trust-region --method sgd --steps 40"
    with tempfile.TemporaryDirectory() as folder:
        options = ["--curvature", "diagonal-factors", "--output", f"{folder}/results"]
        curvlib_command([*command.split(), *options], standalone_mode=False)
