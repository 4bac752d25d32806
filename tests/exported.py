"""The solvers and descents that curvlib exports, found by what they are."""

import inspect

from curvlib import solvers


def is_solver(x):
    """Whether it is called with (operator, damping)."""
    called = inspect.isclass(x) and any("__call__" in vars(base) for base in x.__mro__)
    call = x.__call__ if called else x
    if inspect.isclass(call) or inspect.isabstract(x):
        return False
    parameters = [name for name in inspect.signature(call).parameters if name != "self"]
    return parameters == ["operator", "damping"]


def exported_solvers():
    """The classes and functions that give an inverse of the damped operator."""
    return {x for name in solvers.__all__ if is_solver(x := getattr(solvers, name))}


def exported_descents():
    """The classes that give a step inside a trust region or without one."""
    classes = {x for name in solvers.__all__ if inspect.isclass(x := getattr(solvers, name))}
    return {x for x in classes if issubclass(x, solvers.Descent) and not inspect.isabstract(x)}
