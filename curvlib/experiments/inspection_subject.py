"""What is looked at: a built-in problem that is trained for some steps, or a model of the user's own."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import isfunction
from pathlib import Path
from typing import Any

import torch
from torch import nn

import curvlib
from curvlib.experiments.budgets import Steps
from curvlib.experiments.comparison import Comparison
from curvlib.experiments.errors import ExperimentError
from curvlib.experiments.methods import Method
from curvlib.experiments.problems import LoadedProblem, Problem
from curvlib.experiments.records import Status
from curvlib.experiments.run import Run
from curvlib.experiments.workload import workload_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """An objective on a batch.

    Args:
        title: what it is, in a few words.
        evaluation: the objective on the batch.
        facts: how it was made, name to text.
    """

    title: str
    evaluation: curvlib.Evaluation
    facts: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How far to train a problem before its curvature is looked at.

    Args:
        problem: which one.
        method: with what.
        steps: parameter updates; 0 is the initial network.
        examples: training examples on which the curvature is taken, drawn once.
        seed: of initial parameters, data order and all randomness in training.
        device: where.
    """

    problem: Problem
    method: Method
    steps: int
    examples: int
    seed: int = 0
    device: torch.device

    def __post_init__(self) -> None:
        for name, value, least in (("steps", self.steps, 0), ("examples", self.examples, 1)):
            if value < least:
                raise ExperimentError(f"{name} must be at least {least}, got {value}.")


def trained(
    training: Training,
    loaded: LoadedProblem,
    report: Callable[[str, float], None],
    check: Callable[[curvlib.Evaluation], object],
) -> Subject:
    """Return a problem after some steps of a method.

    Args:
        training: what to do.
        loaded: the problem's data.
        report: told how far the training is.
        check: given the initial network on the batch, to refuse it before the training.

    Raises:
        ExperimentError: the training ended before its last step.
    """
    problem, method = training.problem, training.method
    comparison = Comparison(
        problem=problem,
        methods=(method,),
        budget=Steps(max(1, training.steps)),
        seed=training.seed,
        device=training.device,
        data=loaded.fingerprint,
    )
    cuda = [training.device] if training.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        workload = workload_of(comparison, loaded)
        order = torch.randperm(len(workload.train), generator=torch.Generator().manual_seed(training.seed))
        batch = workload.train[order[: training.examples].to(training.device)].batch
        model = copy.deepcopy(workload.model)
        check(curvlib.Objective(model, workload.loss, l2=problem.l2).at(batch))
        run = Run(workload, method)
        record = run.evaluate()
        while training.steps > 0 and record.status is Status.RUNNING:
            run.train_to_next_evaluation(lambda part: report("training", min(part, 1.0)), lambda: False)
            record = run.evaluate()
    if training.steps > 0 and record.status is not Status.FINISHED:
        raise ExperimentError(
            f"{method.label} {record.status.value} after {record.step} of {training.steps} steps: {record.note} "
            "Use fewer --steps, another --method, or other settings with --set."
        )
    model.load_state_dict(run.state_dict()["model"])
    evaluation = curvlib.Objective(model, workload.loss, l2=problem.l2).at(batch)
    metric = problem.task.metric.name
    return Subject(
        title=f"{problem.name} after {training.steps} step{'s' * (training.steps != 1)} of {method.label}",
        evaluation=evaluation,
        facts={
            "problem": f"{problem.name}: {problem.description}; network {problem.network}",
            "training": f"{training.steps} steps of {method.label}, "
            f"{min(method.batch_size, len(workload.train))} examples a step",
            "reached": f"loss {record.loss:.4g}, {metric} {record.train_metric:.4g} on training examples, "
            f"{record.test_metric:.4g} on test examples",
        },
    )


def own_model(
    path: str,
    function: Callable[[], Any],
    seed: int,
    device: torch.device,
    check: Callable[[curvlib.Evaluation], object],
) -> Subject:
    """Return the model of a user's function.

    Args:
        path: ``module:function``, for messages.
        function: takes nothing and returns (model, loss, (inputs, targets)).
        seed: of PyTorch's random numbers, set before the function is called.
        device: where model and batch go.
        check: given the evaluation, to refuse it.

    Raises:
        ExperimentError: the function fails, or returns something else.
    """
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            returned = function()
    except Exception as error:
        raise ExperimentError(f"--model {path}: the function raised {type(error).__name__}: {error}") from error
    wanted = f"--model {path}: the function must return (model, loss, (inputs, targets))"
    if not isinstance(returned, (tuple, list)) or len(returned) != 3:
        what = type(returned).__name__
        count = f" of length {len(returned)}" if isinstance(returned, (tuple, list)) else ""
        raise ExperimentError(f"{wanted}, got a {what}{count}.")
    model, loss, batch = returned
    if not isinstance(model, nn.Module):
        raise ExperimentError(f"{wanted} with a torch.nn.Module first, got a {type(model).__name__}.")
    try:
        model, loss = model.to(device), loss.to(device) if isinstance(loss, nn.Module) else loss
        evaluation = curvlib.Objective(model, loss).at(_moved(batch, device))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ExperimentError(f"--model {path}: model, loss and batch do not go together: {error}") from error
    check(evaluation)
    return Subject(
        title=path,
        evaluation=evaluation,
        facts={"model": f"{path}: {type(model).__name__} with {evaluation.layout.size:,} parameters"},
    )


def find_function(path: str) -> Callable[[], Any]:
    """Return the function that ``module:function`` names; modules of the current folder are found as well.

    Raises:
        ExperimentError: there is no such module or function, or the module cannot be imported.
    """
    name, colon, attribute = path.partition(":")
    if not (name and colon and attribute):
        raise ExperimentError(f"--model needs MODULE:FUNCTION, such as my_models:trained, got {path!r}.")
    with _current_folder_importable():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                raise ExperimentError(
                    f"--model {path}: there is no module {error.name!r} in the current folder or on Python's path: run "
                    "the command where it lies, or set PYTHONPATH."
                ) from error
            raise ExperimentError(f"--model {path}: importing {name} failed: {error}") from error
        except Exception as error:
            raise ExperimentError(f"--model {path}: importing {name} raised {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        there = sorted(key for key, value in vars(module).items() if isfunction(value) and not key.startswith("_"))
        what = "nothing" if function is None else f"a {type(function).__name__}"
        raise ExperimentError(
            f"--model {path}: {attribute} must be a function of {name}, which has {what} of that name; functions: "
            f"{', '.join(there) or 'none'}."
        )
    return function


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """Look for modules in the current folder first, as ``python -m`` does; an installed command does not."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_moved(item, device) for item in value)
    return value
