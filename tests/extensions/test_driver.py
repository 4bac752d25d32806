"""The layer driver on models that break hook-based frameworks: right, or refused by name."""

import pytest
import torch
from backpack import backpack, extend
from oracles import Network
from torch import nn
from torch.nn import functional

from curvlib import GGN, Objective, UnsupportedLayerError
from curvlib.approximations import KFAC, BlockDiagonal, Diagonal, Exact
from curvlib.extensions import LayerRule, LinearRule, PositionFactors, capture, find_rule, plan_layers, register
from curvlib.parameters import ParameterLayout

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def evaluate(model, inputs, targets, loss=None):
    network = Network(model, loss or nn.MSELoss(), inputs, targets)
    evaluation = Objective(model, network.loss).at((inputs, targets))
    return network, evaluation


def assert_blocks_are_right(network, evaluation):
    """The exact operator, the diagonal and all blocks equal brute force."""
    dense = network.ggn()
    torch.testing.assert_close(Exact(GGN()).estimate(evaluation).to_dense(), dense, **CLOSE)
    blocks = BlockDiagonal(GGN()).estimate(evaluation).to_dense()
    for layer in evaluation.layers:
        rows, columns = layer.coordinates.unsqueeze(1), layer.coordinates
        torch.testing.assert_close(blocks[rows, columns], dense[rows, columns], **CLOSE)
    torch.testing.assert_close(Diagonal(GGN()).estimate(evaluation).diagonal(), dense.diagonal(), **CLOSE)


def rebuilt_gradient(evaluation, vector):
    """J^T v summed over examples, put together from (a, g) alone."""
    rebuilt = torch.zeros(evaluation.layout.size, dtype=torch.float64)
    for factors in evaluation.layer_factors(vector):
        rebuilt[factors.layer.coordinates] = torch.cat(list(factors.per_example_gradients())).sum(0)
    return rebuilt


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.again(torch.tanh(self.again(self.first(x))))


class TiedWeights(nn.Module):
    """Two modules that share weight and bias: one layer with two positions."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)
        self.right.weight, self.right.bias = self.left.weight, self.left.bias

    def forward(self, x):
        return self.right(torch.tanh(self.left(x)))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        out = functional.relu_(self.a(x))
        out = self.b(out)
        out += x
        return out


class KeywordArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.output = nn.Linear(3, 2)  # the name of an attribute that BackPACK writes to
        self.input0 = nn.Linear(3, 3)

    def forward(self, x, *, scale):
        return self.output(input=torch.tanh(self.input0(input=x)) * scale)


class NestedOutput(nn.Linear):
    """A layer that itself has a submodule called ``output``."""

    def __init__(self):
        super().__init__(3, 2)
        self.output = nn.Identity()


@pytest.mark.parametrize("make", [CalledTwice, TiedWeights, InPlace])
def test_sharing_and_in_place_operations_are_right(make):
    network, evaluation = evaluate(make().double(), torch.randn(5, 3).double(), torch.randn(5, 3).double())
    assert_blocks_are_right(network, evaluation)
    torch.testing.assert_close(rebuilt_gradient(evaluation, evaluation.output_gradient), network.gradient(), **CLOSE)


class InPlaceOnViews(nn.Module):
    """For several positions ``Linear`` with a bias returns a view, which in-place operations give another history."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        out = functional.relu_(self.a(x))
        out = self.b(out).mul_(2.0)
        out += x
        return functional.dropout(self.c(out), training=False, inplace=True).add_(1.0)


@pytest.mark.parametrize("positions", [(), (2,), (2, 2)])
def test_in_place_operations_on_outputs_at_several_positions_are_right(positions):
    x, y = torch.randn(3, *positions, 3).double(), torch.randn(3, *positions, 3).double()
    network, evaluation = evaluate(InPlaceOnViews().double(), x, y)
    assert_blocks_are_right(network, evaluation)


def test_vectors_may_be_parts_of_larger_tensors():
    """The output of the layer is the model's own, and a view: the vector itself arrives as its gradient."""
    x, y = torch.randn(1, 3, 3).double(), torch.randn(1, 3, 2).double()
    network, evaluation = evaluate(nn.Linear(3, 2).double(), x, y)
    for vector in torch.randn(2, *y.shape).double():
        rebuilt = rebuilt_gradient(evaluation, vector)
        torch.testing.assert_close(rebuilt, network.jacobian().T @ vector.flatten(), **CLOSE)


class Deep(nn.Module):
    """Seven calls, the last one of a layer of its own or of the first layer again."""

    def __init__(self, again):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6 if again else 7)))
        self.again = again

    def forward(self, x):
        return self.layers[0](torch.tanh(self.layers(x))) if self.again else self.layers(x)


@pytest.mark.parametrize(("again", "passes"), [(False, [6, 1]), (True, [7])])
def test_two_backward_passes_give_what_one_gives(again, passes, monkeypatch):
    network, evaluation = evaluate(Deep(again).double(), torch.randn(5, 3).double(), torch.randn(5, 3).double())
    vector = torch.randn(5, 3).double()
    once = rebuilt_gradient(evaluation, vector)
    assert [len(calls) for calls in evaluation._tape._passes()] == [7]
    monkeypatch.setattr(capture, "_MANY_BYTES", 0)
    assert [len(calls) for calls in evaluation._tape._passes()] == passes, "the calls of a layer stay together"
    torch.testing.assert_close(rebuilt_gradient(evaluation, vector), once, **CLOSE)
    assert_blocks_are_right(network, evaluation)


def test_a_layer_at_no_position_has_zero_curvature():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "empty": nn.Linear(3, 2)}).double()
    model.forward = lambda x: model["used"](x) + model["empty"](x.new_zeros(4, 0, 3)).sum(1)
    _, evaluation = evaluate(model, torch.randn(4, 3).double(), torch.randn(4, 2).double())
    for approximation in (KFAC(GGN()), Diagonal(GGN()), BlockDiagonal(GGN())):
        assert approximation.estimate(evaluation).to_dense()[8:].abs().max() == 0


def test_calls_of_one_layer_are_positions():
    _, evaluation = evaluate(CalledTwice().double(), torch.randn(5, 3).double(), torch.randn(5, 3).double())
    positions = {f.layer.name: f.maps[0].a.shape for f in evaluation.layer_factors(torch.ones(5, 3).double())}
    assert positions == {"first": (5, 1, 1, 4), "again": (5, 2, 1, 4)}


def test_tied_modules_are_one_layer():
    _, evaluation = evaluate(TiedWeights().double(), torch.randn(5, 3).double(), torch.randn(5, 3).double())
    (layer,) = evaluation.layers
    assert layer.modules == ("left", "right")
    assert "shared by left, right" in str(evaluation.objective.describe(KFAC(GGN())))


def test_keyword_arguments_and_modules_called_output():
    model, x = KeywordArguments().double(), torch.randn(4, 3).double()
    network, evaluation = evaluate(model, {"x": x, "scale": 2.0 * torch.ones(())}, torch.randn(4, 2).double())
    assert_blocks_are_right(network, evaluation)
    assert isinstance(model.output, nn.Linear)


def test_a_submodule_called_output_inside_a_layer_survives():
    model = NestedOutput().double()
    network, evaluation = evaluate(model, torch.randn(4, 3).double(), torch.randn(4, 2).double())
    assert_blocks_are_right(network, evaluation)
    assert isinstance(model.output, nn.Identity)
    assert not {"input0", "output"} & set(vars(model))


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_partly_frozen_parameters(frozen):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model.get_parameter(frozen).requires_grad_(False)
    network, evaluation = evaluate(model, torch.randn(5, 3).double(), torch.randn(5, 2).double())
    assert_blocks_are_right(network, evaluation)
    one = Network(model, nn.MSELoss(), network.inputs[:1], network.targets[:1])
    kfac = KFAC(GGN()).estimate(Objective(model, nn.MSELoss()).at((one.inputs, one.targets))).to_dense()
    for layer in evaluation.layers:
        rows, columns = layer.coordinates.unsqueeze(1), layer.coordinates
        torch.testing.assert_close(kfac[rows, columns], one.ggn()[rows, columns], **CLOSE)


class UsedOutside(nn.Module):
    """An auto-encoder whose decoder uses the encoder's weight behind the module's back."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 2), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(functional.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t()))


def test_a_weight_used_outside_of_its_module_is_refused_by_name_or_falls_back():
    model = UsedOutside().double()
    network, evaluation = evaluate(model, torch.randn(4, 3).double(), torch.randn(4, 3).double())
    with pytest.raises(UnsupportedLayerError, match=r"encoder\.weight: used outside of its module's own call"):
        KFAC(GGN()).estimate(evaluation)
    torch.testing.assert_close(Exact(GGN()).estimate(evaluation).to_dense(), network.ggn(), **CLOSE)
    fallback = Diagonal(GGN(), on_unsupported="diagonal").estimate(evaluation)
    torch.testing.assert_close(fallback.diagonal(), network.ggn().diagonal(), **CLOSE)


class Scaled(nn.Module):
    """A parameter that belongs to no known layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3))
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(torch.sigmoid(self.scale * x))


class NotCalled(nn.Module):
    """Must never run: refusals come before any computation."""

    def forward(self, x):
        raise AssertionError("computed something")


def test_unsupported_parameters_are_named_before_any_computation():
    model = nn.Sequential(Scaled(), NotCalled())
    objective = Objective(model, nn.MSELoss())
    with pytest.raises(UnsupportedLayerError, match=r"0\.scale: no layer rule for Scaled"):
        KFAC(GGN()).estimate_over(objective, [(torch.randn(2, 3), torch.randn(2, 2))], progress=False)
    with pytest.raises(UnsupportedLayerError, match=r"0\.scale"):
        KFAC(GGN()).check(objective)
    table = str(objective.describe(KFAC(GGN())))
    assert "refused" in table
    assert "no layer rule for Scaled" in table


def test_fallbacks_for_unsupported_parameters():
    network, evaluation = evaluate(Scaled().double(), torch.randn(6, 3).double(), torch.randn(6, 2).double())
    diagonal = network.ggn().diagonal()
    C = KFAC(GGN(), on_unsupported="diagonal").estimate(evaluation)
    torch.testing.assert_close(C.to_dense()[:3, :3], torch.diag(diagonal[:3]), **CLOSE)
    assert "exact diagonal" in str(evaluation.objective.describe(KFAC(GGN(), on_unsupported="diagonal")))
    excluded = KFAC(GGN(), on_unsupported="exclude").estimate(evaluation).to_dense()
    assert torch.equal(excluded[:3], torch.zeros_like(excluded[:3]))
    torch.testing.assert_close(excluded[3:, 3:], C.to_dense()[3:, 3:], **CLOSE)
    assert "zero curvature" in str(evaluation.objective.describe(KFAC(GGN(), on_unsupported="exclude")))


def test_an_unknown_fallback_is_refused():
    with pytest.raises(ValueError, match="on_unsupported must be one of"):
        KFAC(GGN(), on_unsupported="ignore")


def test_a_weight_shared_with_another_bias_is_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(UnsupportedLayerError, match=r"0\.weight: shared by '0' and '1', whose other parameters differ"):
        KFAC(GGN()).check(Objective(model, nn.MSELoss()))


def test_an_input_modified_in_place_after_its_use_is_refused_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            hidden = x * 1.0
            out = self.layer(hidden)
            hidden.zero_()
            return out

    _, evaluation = evaluate(Model(), torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="the input of module 'layer' was modified in place"):
        KFAC(GGN()).estimate(evaluation)


def test_a_batch_modified_in_place_is_refused():
    x = torch.randn(4, 3)
    _, evaluation = evaluate(nn.Linear(3, 3), x, torch.randn(4, 3))
    x.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        KFAC(GGN()).estimate(evaluation)


def test_outputs_with_another_number_of_examples_are_refused():
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x).flatten(0, 1)

    _, evaluation = evaluate(Flattened(), torch.randn(4, 5, 3), torch.randn(20, 2))
    with pytest.raises(UnsupportedLayerError, match="outputs have 20 examples"):
        KFAC(GGN()).estimate(evaluation)


def test_unused_branches_have_no_curvature_and_no_gradient():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)}).double()
    model.forward = lambda x: model["used"](x)
    objective = Objective(model, nn.MSELoss())
    evaluation = objective.at((torch.randn(4, 3).double(), torch.randn(4, 2).double()))
    assert evaluation.gradient()[8:].abs().max() == 0
    assert KFAC(GGN()).estimate(evaluation).to_dense()[8:].abs().max() == 0


class Doubled(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


def test_a_subclass_that_overrides_forward_needs_its_own_rule():
    rule, reason = find_rule(Doubled(2, 2))
    assert rule is None
    assert reason == "Doubled overrides Linear.forward"


def test_a_subclass_that_keeps_forward_inherits_the_rule():
    class Renamed(nn.Linear):
        pass

    network, evaluation = evaluate(Renamed(3, 2).double(), torch.randn(4, 3).double(), torch.randn(4, 2).double())
    assert_blocks_are_right(network, evaluation)


def test_register_a_rule_for_a_module_of_ones_own():
    class Tripled(nn.Linear):
        def forward(self, x):
            return 3.0 * super().forward(x)

    class TripledRule(LinearRule):
        def output_gradients(self, module, g):
            return 3.0 * super().output_gradients(module, g)

    model = nn.Sequential(Tripled(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with pytest.raises(UnsupportedLayerError, match=r"Tripled overrides Linear\.forward"):
        KFAC(GGN()).check(Objective(model, nn.MSELoss()))
    register(Tripled, TripledRule())
    network, evaluation = evaluate(model, torch.randn(4, 3).double(), torch.randn(4, 2).double())
    assert_blocks_are_right(network, evaluation)


def test_register_refuses_what_is_no_module_or_rule():
    with pytest.raises(TypeError, match=r"subclass of torch\.nn\.Module"):
        register(int, LinearRule())
    with pytest.raises(TypeError, match="instance of a LayerRule subclass"):
        register(nn.Bilinear, LinearRule)


def test_a_rule_without_its_methods_says_what_is_missing():
    class Empty(LayerRule):
        pass

    with pytest.raises(TypeError, match="Empty must define inputs"):
        Empty().inputs(nn.Linear(2, 2), torch.ones(1, 2))


def test_parametrised_weights_are_refused_by_name():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(UnsupportedLayerError, match=r"no layer rule for ParametrizedLinear|computed"):
        KFAC(GGN()).check(Objective(model, nn.MSELoss()))


def test_user_hooks_that_change_a_layers_output_are_seen_after_it():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].register_forward_hook(lambda module, args, out: 5.0 * out)
    network, evaluation = evaluate(model, torch.randn(4, 3).double(), torch.randn(4, 2).double())
    assert_blocks_are_right(network, evaluation)


def test_autocast_bfloat16_agrees_with_float32_to_bfloat16():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = torch.randn(16, 6), torch.randint(3, (16,))
    objective = Objective(model, nn.CrossEntropyLoss())
    full = objective.at(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = objective.at(batch)
    assert low._graph.dtype == torch.bfloat16
    v = torch.randn(objective.layout.size)
    pairs = [(low.gradient(), full.gradient())]
    for approximation in (Exact(GGN()), KFAC(GGN()), Diagonal(GGN()), BlockDiagonal(GGN())):
        C, reference = approximation.estimate(low), approximation.estimate(full)
        assert (C @ v).dtype == torch.float32
        pairs.append((C @ v, reference @ v))
    for result, reference in pairs:
        # bfloat16 keeps 8 bits: 2^-8 a rounding, a handful of them in a row
        assert (result - reference).norm() < 8 * 2**-8 * reference.norm()


def test_bfloat16_parameters_give_float32_curvature():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    objective = Objective(model, nn.CrossEntropyLoss())
    evaluation = objective.at((torch.randn(16, 6).bfloat16(), torch.randint(3, (16,))))
    C = KFAC(GGN()).estimate(evaluation)
    assert C.dtype == evaluation.gradient().dtype == torch.float32


def test_rules_work_in_a_plain_backpack_block():
    layer, x = extend(nn.Linear(3, 2).double()), torch.randn(5, 3).double().requires_grad_()
    with backpack(PositionFactors()):
        layer(x).square().sum().backward()
    use = layer.weight.position_factors
    torch.testing.assert_close(torch.einsum("nto,nti->oi", use.g, use.a), layer.weight.grad)
    assert layer.bias.position_factors.a.shape == (5, 1, 3)


def test_the_plan_lists_layers_in_the_models_order():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    plan = plan_layers(model, ParameterLayout.of(model))
    maps = [layer.maps[0] for layer in plan.layers]
    assert [(part.name, part.d_out, part.columns) for part in maps] == [("0", 4, 4), ("2", 2, 5)]
    covered = torch.cat([layer.coordinates for layer in plan.layers]).sort().values
    assert torch.equal(covered, torch.arange(4 * 4 + 2 * 5))
