"""The examples run without a warning, and the numbers that they print support what they say."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from exported import exported_descents, exported_solvers
from torch import nn

from curvlib import GGN, Objective, UnsupportedLayerError
from curvlib.approximations import KFAC, PerLayer
from curvlib.experiments import APPROXIMATIONS
from curvlib.testing import ExactOn, check_approximation
from curvlib.testing.exactness import diagonal_entries

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(name, capsys):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def table(text, columns):
    """Rows of the printed table: a name, then that many numbers."""
    rows = re.findall(r"^(\S.*?)" + r"\s+(-?\d+\.\d+)" * columns + "$", text, re.MULTILINE)
    return {name: [float(number) for number in numbers] for name, *numbers in rows}


def test_every_example_is_short_and_tested():
    scripts = {path.stem: path.read_text().splitlines() for path in EXAMPLES.glob("*.py")}
    assert scripts.keys() == {
        "gpt_on_text",
        "nonlinear_regression",
        "one_step_by_hand",
        "own_approximation",
        "swap_curvatures",
        "train_with_presets",
    }
    assert all(len(lines) < 75 for lines in scripts.values())


def test_one_step_by_hand(capsys):
    text = output_of("one_step_by_hand", capsys)
    rows = table(text, 3)
    assert list(rows) == ["exact Gauss-Newton", "K-FAC", "gradient"]
    assert "converged" in text
    damped = {name: row[0] for name, row in rows.items()}
    assert min(damped, key=damped.get) == "exact Gauss-Newton", "it minimises the damped model"
    for name, (_, model, loss) in rows.items():
        assert loss < 0, f"the {name} step lowers the loss"
        assert model == pytest.approx(loss, rel=0.15), "the undamped model forecasts the change"
    before, after = (float(re.search(pattern, text)[1]) for pattern in (r", loss (\d\.\d+)", r"exact step: (\d\.\d+)"))
    assert after == pytest.approx(before + rows["exact Gauss-Newton"][2], abs=2e-4)


def test_swap_curvatures(capsys):
    rows = table(output_of("swap_curvatures", capsys), 3)
    assert len(rows) == 8
    error = {name: row[0] for name, row in rows.items()}
    cosine = {name: row[1] for name, row in rows.items()}
    assert error["exact GGN"] == 0.0
    assert cosine["exact GGN"] == 1.0
    assert 0 < error["blocks of the GGN"] < error["diagonal of the GGN"] < error["identity"]
    assert 0 < error["K-FAC, GGN"] < error["diagonal of the GGN"]
    assert len(set(error.values())) == 8, "every choice makes a step of its own"
    assert all(change < 0 for _, _, change in rows.values())


def test_train_with_presets(capsys):
    rows = table(output_of("train_with_presets", capsys), 3)
    assert list(rows) == ["kfac", "hessian_free", "torch Adam"]
    loss = {name: row[0] for name, row in rows.items()}
    assert loss["kfac"] < loss["torch Adam"], "in the same number of passes over the data"
    assert loss["hessian_free"] < loss["torch Adam"]
    assert all(accuracy > 0.8 for _, accuracy, _ in rows.values())


def test_gpt_on_text(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpt_on_text.py"])
    text = output_of("gpt_on_text", capsys)
    assert re.search(r"embedding\.weight .*A diagonal of .* \+ Kronecker: .*shared by embedding, head", text)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", text)]
    assert len(losses) == 4
    assert losses[-1] < 0.85 * losses[0]


def test_nonlinear_regression(capsys):
    text = output_of("nonlinear_regression", capsys)
    assert text.startswith("converged")
    rows = re.findall(r"^b\d\s+(\S+)\s+(\S+)\s+(\S+)\s+(\S+)$", text, re.MULTILINE)
    assert len(rows) == 3
    assert all(float(digits) > 10 for row in rows for digits in (row[1], row[3])), "certified values have 11"
    # certified residual standard deviation
    assert float(re.search(r"deviation (\S+)", text)[1]) == pytest.approx(1.1587725499, rel=1e-9)


def test_own_approximation(capsys, monkeypatch):
    # the name that it registers is forgotten afterwards
    monkeypatch.setattr(APPROXIMATIONS, "_values", dict(APPROXIMATIONS._values))
    text = output_of("own_approximation", capsys)
    assert text.count("product of two diagonals") == 4
    rows = table(text, 2)
    change, length = ({name: row[i] for name, row in rows.items()} for i in (0, 1))
    every = {x.__name__ for x in exported_solvers() | exported_descents()}
    assert every <= rows.keys(), "every solver and descent that curvlib exports"
    assert all(value < 0 for value in change.values())
    for name in ("of its eigenvalues", "CG", "MINRES", "DeterminismCheck", "DampedNewton"):
        assert change[name] == pytest.approx(change["damped_inverse"], abs=2e-4), "they solve the same system"
    for name in ("Steihaug", "Dogleg", "MoreSorensen", "TwoDimensionalSubspace"):
        assert length[name] == pytest.approx(0.5 * length["DampedNewton"], rel=1e-3), "the boundary stops them"
    for name in ("FactoredTikhonov", "BlockwiseDamping"):
        assert length[name] < length["damped_inverse"], "another damping"
    assert min(change, key=change.get) == "preconditioning exact"
    trained = re.findall(r"(\S+) *\(diagonal-factors \w+\) .*step 40 +loss (\d+\.\d+)", text)
    assert [name for name, _ in trained] == ["kfac", "newton-trust-region"]
    assert all(float(loss) < 1.0 for _, loss in trained), "both train"


@pytest.fixture
def diagonal_factors():
    return runpy.run_path(str(EXAMPLES / "own_approximation.py"))["DiagonalFactors"]


def test_own_approximation_keeps_the_identities_of_all(diagonal_factors):
    # ignored targets of examples and of positions among them; of one example the diagonal is exact
    exact = ExactOn(part=diagonal_entries, examples=1, positions=False)
    check_approximation(diagonal_factors(GGN()), exact_on=exact, examples=25)


@pytest.mark.parametrize(
    ("model", "inputs", "words"),
    [
        (nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)), torch.tensor([0, 1]), "0.weight of Embedding: "),
        (nn.LayerNorm(2), torch.ones(3, 2), "weight of LayerNorm: "),
        (nn.Conv1d(2, 2, 1, groups=2), torch.ones(3, 2, 4), "weight of Conv1d: "),
    ],
    ids=["embedding", "norm", "groups"],
)
def test_own_approximation_refuses_other_layers_by_name(diagonal_factors, model, inputs, words):
    objective, targets = Objective(model, nn.MSELoss()), torch.zeros_like(model(inputs))
    own = diagonal_factors(GGN())
    for approximation in (own, PerLayer([], otherwise=own)):
        with pytest.raises(UnsupportedLayerError, match=words):
            approximation.estimate(objective.at((inputs, targets)))
        assert approximation.describe(objective).rows[0].block == "refused"
    chosen = PerLayer([(type(next(m for m in model.modules() if m._parameters)), None)], otherwise=own)
    assert chosen.estimate(objective.at((inputs, targets))).size == objective.layout.size


def test_own_approximation_is_the_diagonal_of_kfac_whatever_the_padding(diagonal_factors):
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    objective = Objective(_ClassesFirst(model), nn.CrossEntropyLoss())
    inputs, targets = torch.randn(4, 5, 2).double(), torch.randint(3, (4, 5))
    targets[:, 3:] = -100
    targets[3] = -100
    for T in (5, 3):
        evaluation = objective.at((inputs[:, :T], targets[:, :T]))
        C = diagonal_factors(GGN()).estimate(evaluation).to_dense()
        torch.testing.assert_close(C, KFAC(GGN()).estimate(evaluation).diagonal().diag())
        torch.testing.assert_close(C, diagonal_factors(GGN()).estimate(objective.at((inputs, targets))).to_dense())


class _ClassesFirst(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).movedim(-1, 1)


def test_own_approximation_is_defined_in_few_lines():
    text = (EXAMPLES / "own_approximation.py").read_text()
    body = text.split("@dataclass(frozen=True)")[1].split('if __name__ == "__main__":')[0]
    assert len(body.strip().splitlines()) < 40
