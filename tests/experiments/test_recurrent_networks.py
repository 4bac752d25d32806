"""Recurrent networks: their description and initialisations, and comparisons that train one."""

import pytest
import torch
from command_line_calls import call, compare, results
from torch import nn

from curvlib import Objective
from curvlib.approximations import StructuralDamping
from curvlib.experiments import (
    METHODS,
    PROBLEMS,
    Comparison,
    Embedded,
    EveryStep,
    ExperimentError,
    FullyConnected,
    LastStep,
    Numbers,
    OneHot,
    Recurrent,
    ResultsFolder,
    Rows,
    Steps,
    configure,
    prepare_folder,
    register_method,
)
from curvlib.experiments import compare as run_comparison
from curvlib.experiments.recurrent import orthogonal, remembering, sparse_recurrent
from curvlib.optimizers import hessian_free

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune.\n" * 12
SYMBOLS = torch.tensor([[0, 3, 1, 2, 4], [4, 4, 0, 1, 3]])


def network(**changes):
    described = {"entry": Numbers(features=3), "cell": nn.RNN, "outputs": 4, "exit": LastStep(), "units": 6}
    return Recurrent(**{**described, **changes})


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize(
    ("entry", "inputs"),
    [
        (Numbers(features=3), torch.rand(2, 5, 3)),
        (Rows(rows=5, features=3), torch.rand(2, 15)),
        (OneHot(features=5), SYMBOLS),
        (Embedded(features=3, symbols=5), SYMBOLS),
    ],
    ids=["numbers", "rows", "one-hot", "embedded"],
)
def test_examples_come_first_and_classes_second(cell, entry, inputs):
    for exit_, shape in ((LastStep(), (2, 4)), (EveryStep(), (2, 4, 5))):
        described = network(entry=entry, cell=cell, exit=exit_)
        model = described.build()
        assert model(inputs).shape == shape
        assert sum(p.numel() for p in model.parameters()) == described.parameters
        assert model[1].batch_first


def test_the_network_is_the_recursion_that_it_says():
    torch.manual_seed(0)
    model = network(entry=Rows(rows=5, features=3), exit=EveryStep()).build().double()
    images = torch.rand(2, 15, dtype=torch.float64)
    layer, readout = model[1], model[3]
    state, expected = torch.zeros(2, 6, dtype=torch.float64), []
    for t in range(5):
        row = images[:, 3 * t : 3 * t + 3]
        state = torch.tanh(
            row @ layer.weight_ih_l0.T + layer.bias_ih_l0 + state @ layer.weight_hh_l0.T + layer.bias_hh_l0
        )
        expected.append(state @ readout.weight.T + readout.bias)
    torch.testing.assert_close(model(images), torch.stack(expected, dim=2))
    last = network(entry=Rows(rows=5, features=3)).build().double()
    last.load_state_dict(model.state_dict())
    torch.testing.assert_close(last(images), expected[-1])


def test_one_hot_symbols_choose_a_column_in_the_type_of_the_model():
    entry = OneHot(features=5).build().double()
    assert torch.equal(entry(SYMBOLS), nn.functional.one_hot(SYMBOLS, 5).double())
    assert not list(entry.parameters())


@pytest.mark.parametrize(("cell", "maps"), [(nn.RNN, 1), (nn.LSTM, 4), (nn.GRU, 3)])
def test_orthogonal_blocks(cell, maps):
    layer = cell(20, 30)
    orthogonal(layer)
    blocks = layer.weight_hh_l0.detach().split(30)
    assert len(blocks) == maps
    for block in blocks:
        torch.testing.assert_close(block @ block.T, torch.eye(30), atol=1e-5, rtol=0)
    # Uniform on (-b, b), b^2 = 6 / 50, block by block and not as one matrix of 20 inputs and 30 maps outputs.
    assert layer.weight_ih_l0.abs().max().item() == pytest.approx((6 / 50) ** 0.5, rel=0.02)
    assert torch.count_nonzero(layer.bias_ih_l0) == torch.count_nonzero(layer.bias_hh_l0) == 0


def test_remembering_opens_the_forget_gate():
    layer = nn.LSTM(3, 400)
    remembering(layer)
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
        layer.weight_ih_l0.zero_()
        cell = torch.ones(1, 1, 400)
        _, (_, after) = layer(torch.zeros(1, 1, 3), (torch.zeros(1, 1, 400), cell))
    # sigmoid(1) of the memory stays; the input gate is half open, but its candidate is tanh(0).
    torch.testing.assert_close(after, torch.full_like(after, torch.tensor(1.0).sigmoid().item()))


def test_sparse_recurrent_has_fifteen_connections_and_radius_one():
    torch.manual_seed(0)
    layer = nn.RNN(50, 80)
    sparse_recurrent(layer)
    weight = layer.weight_hh_l0.detach()
    assert torch.equal((weight != 0).sum(dim=1), torch.full((80,), 15))
    assert torch.linalg.eigvals(weight.double()).abs().max().item() == pytest.approx(1.0, abs=1e-4)
    assert layer.weight_ih_l0.var().item() == pytest.approx(1.0, rel=0.1)
    assert torch.count_nonzero(layer.bias_ih_l0) == torch.count_nonzero(layer.bias_hh_l0) == 0
    sparse_recurrent(small := nn.RNN(2, 6))
    assert torch.count_nonzero(small.weight_hh_l0) == 36


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": 0}, r"problem\.units must be an integer at least 1, got 0"),
        ({"outputs": 0}, "outputs must be at least 1, got 0"),
    ],
)
def test_a_network_that_cannot_be_is_refused(change, message):
    with pytest.raises(ExperimentError, match=message):
        network(**change)
    with pytest.raises(ExperimentError, match="features must be at least 1"):
        Numbers(features=0)


def test_an_alphabet_decides_what_is_open_and_nothing_else():
    language = network(entry=Embedded(features=3), outputs=None, exit=EveryStep())
    assert language.parameters is None
    assert language.for_symbols(7).build()(SYMBOLS).shape == (2, 7, 5)
    assert language.for_symbols(7).parameters == 7 * 3 + 6 * (3 + 6 + 2) + 7 * 7
    with pytest.raises(ExperimentError, match="number of outputs"):
        language.build()
    with pytest.raises(ExperimentError, match="size of the alphabet"):
        Embedded(features=3).build()
    with pytest.raises(ExperimentError, match="outputs is fixed at 4"):
        network().for_symbols(7)
    with pytest.raises(ExperimentError, match="takes no alphabet of 7 symbols: use Embedded"):
        network(outputs=None).for_symbols(7)
    with pytest.raises(ExperimentError, match=r"takes no symbols.*alphabet of 7: use Recurrent"):
        FullyConnected(widths=(2, 2), activation=nn.Tanh).for_symbols(7)


SMALL = {
    "rowwise-digits-rnn": ("--set", "problem.units=16"),
    "addition": ("--set", "problem.length=6", "--set", "problem.train_sequences=300"),
    "copy-memory": ("--set", "problem.length=2", "--set", "problem.units=20", "--set", "problem.train_sequences=200"),
    "character-lm": ("--set", "problem.length=10", "--set", "problem.units=16"),
}


def improvements(path, problem, *methods, steps):
    path.mkdir()
    words = [word for method in methods for word in ("--method", method)]
    if PROBLEMS.get(problem).source.reads_files:
        (path / "text").write_text(TEXT)
        words += ["--data", path / "text"]
    small = ("--problem", problem, "--batch-size", 100, *SMALL[problem], "--steps", steps)
    outcome = compare(path / "out", *small, *words)
    assert outcome.exit_code == 0, outcome.output
    records = {name: [r for r in results(path / "out") if r["method"] == name] for name in methods}
    assert len({own[0]["loss"] for own in records.values()}) == 1
    return {name: own[0]["loss"] - own[-1]["loss"] for name, own in records.items()}


@pytest.mark.parametrize("problem", SMALL)
def test_methods_without_layer_rules_train_recurrent_networks(tmp_path, problem):
    gains = improvements(tmp_path / "a", problem, "sgd", "adam", "lbfgs", steps=10)
    assert min(gains.values()) > 0.05, gains
    assert improvements(tmp_path / "b", problem, "hessian-free", steps=2)["hessian-free"] > 0.05


def test_options_of_hessian_free_change_its_steps(tmp_path):
    def losses(name, *words):
        small = ("--problem", "addition", "--method", "hessian-free", *SMALL["addition"], "--steps", 3)
        outcome = compare(tmp_path / name, *small, "--set", "hessian-free.batch_size=100", *words)
        assert outcome.exit_code == 0, outcome.output
        return [record["loss"] for record in results(tmp_path / name)]

    none = ("--set", "hessian-free.structural_weight=0")
    plain = losses("plain", *none)
    assert losses("weak", "--set", "hessian-free.structural_weight=0.01") != plain
    assert losses("short", *none, "--set", "hessian-free.cg_iterations=1") != plain


def test_structural_damping_is_that_of_the_preset():
    """The same steps as with the objects themselves, at mu and the limit that were asked for."""
    problem = PROBLEMS.get("addition").with_options({"length": "4", "units": "5", "train_sequences": "20"})
    loaded = problem.load()
    steps = []
    for mu, limit in ((0.7, 9), (0.7, 2), (0.0, 9)):
        options = {"structural_weight": mu, "cg_iterations": limit, "curvature_fraction": 1.0, "damping": 0.1}
        torch.manual_seed(0)
        model, twin = (problem.network.build() for _ in range(2))
        twin.load_state_dict(model.state_dict())
        method = METHODS.get("hessian-free")(**options)
        trainer = method.start(model, loaded.loss, problem.l2, seed=3)
        optimizer = hessian_free(
            Objective(twin, loaded.loss, l2=problem.l2),
            damping=0.1,
            structural_damping=StructuralDamping() if mu else None,
            structural_weight=0.7,
            max_iterations=limit,
            seed=3,
        )
        for _ in range(2):
            assert trainer.step(loaded.train.batch).loss == optimizer.step(loaded.train.batch).loss
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert torch.equal(steps[-1], torch.cat([p.detach().flatten() for p in twin.parameters()]))
    assert not torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], steps[2])


def test_structural_damping_without_recurrent_layers_is_refused_before_anything_is_written(tmp_path):
    words = ("--method", "sgd", "--method", "hessian-free", "--steps", 1, "--set", "hessian-free.structural_weight=0.1")
    outcome = compare(tmp_path / "out", *words, "--problem", "digits-classifier")
    assert outcome.exit_code == 2
    text = " ".join(outcome.output.replace("│", " ").split())
    assert "hessian-free.structural_weight=0.1 is for networks with recurrent layers; for this one use 0" in text
    assert "Known: (model) (Sequential), 0 (Linear)" in text
    assert not (tmp_path / "out").exists()


def test_kfac_trains_a_recurrent_network(tmp_path):
    assert improvements(tmp_path / "a", "rowwise-digits-rnn", "kfac", steps=10)["kfac"] > 0.05


def test_a_comparison_says_what_is_to_be_beaten(tmp_path):
    outcome = compare(tmp_path, "--problem", "addition", "--method", "sgd", "--steps", 1, *SMALL["addition"])
    text = " ".join(outcome.output.split())
    assert "(without it 0.1667 for always answering 1, the mean)" in text
    assert "on 300 training and 2000 test sequences" in text
    listing = " ".join(call("problems").output.replace("│", " ").split())
    assert "loss to get below: 0.6931 for blanks, then guesses" in listing
    assert "--set problem.length=10: blanks between the symbols" in listing
    assert "parameters: depend on the symbols of the data" in listing


def test_a_comparison_is_gone_on_with_on_its_own_text_alone(tmp_path):
    for name, content in (("one", TEXT), ("two", TEXT.upper())):
        (tmp_path / name).write_text(content)
    words = ("--problem", "character-lm", "--method", "sgd", "--set", "problem.length=10", "--set", "problem.units=8")
    first = compare(tmp_path / "out", *words, "--steps", 2, "--data", tmp_path / "one")
    assert first.exit_code == 0, first.output
    assert "on at most 1000 training and test sequences" in " ".join(first.output.split())
    resumed = compare(tmp_path / "out", *words, "--steps", 3, "--data", tmp_path / "two", "--resume")
    assert resumed.exit_code == 2
    assert "data was 1092 characters, sha256 " in " ".join(resumed.output.split())
    resumed = compare(tmp_path / "out", *words, "--steps", 3, "--data", tmp_path / "one", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert results(tmp_path / "out")[-1]["step"] == 3


def test_python_callers_say_which_text_it_is(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    problem = PROBLEMS.get("character-lm").with_options({"length": "10", "units": "8"})
    loaded = problem.load(tmp_path / "text")
    comparison = Comparison(problem=problem, methods=(configure("sgd", problem, {}),), budget=Steps(1))
    folder = ResultsFolder(tmp_path / "out")
    prepare_folder(comparison, folder)
    with pytest.raises(ExperimentError, match=r"use Comparison\(\.\.\., data=loaded\.fingerprint\)"):
        run_comparison(comparison, loaded, folder)


def test_no_method_takes_the_name_that_is_in_front_of_the_problems_options():
    class Impostor(METHODS.get("sgd")):
        name = "problem"

    with pytest.raises(ExperimentError, match="No method can be named 'problem'"):
        register_method(Impostor)


def test_options_change_the_training_and_bind_a_resumption(tmp_path):
    words = ("--problem", "addition", "--method", "sgd", "--set", "problem.train_sequences=200", "--steps", 2)
    shorter = compare(tmp_path / "a", *words, "--set", "problem.length=5")
    longer = compare(tmp_path / "b", *words, "--set", "problem.length=8")
    assert shorter.exit_code == longer.exit_code == 0
    assert results(tmp_path / "a")[0]["loss"] != results(tmp_path / "b")[0]["loss"]
    resumed = compare(tmp_path / "a", *words, "--set", "problem.length=8", "--resume")
    assert resumed.exit_code == 2
    assert "length=5" in resumed.output
