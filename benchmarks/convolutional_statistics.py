"""K-FAC's statistics of convolutional networks, with one label drawn from the model for each example."""

from __future__ import annotations

from benchmarks.convolutional_networks import CONVOLUTIONAL_CHAIN, RESNET, RESNET_LARGE_STEM
from benchmarks.kfac_statistics import by_backpack, by_curvlinops
from benchmarks.subjects import Benchmark, Call, Subject, Target
from benchmarks.workload import Workload
from curvlib import Fisher
from curvlib.approximations import KFAC

_STATISTICS = "curvlib: statistics alone"


def _statistics(workload: Workload) -> Call:
    evaluation, approximation = workload.objective.at(workload.batch, linearize=False), KFAC(Fisher())
    return lambda: approximation.statistics(evaluation)


def _with_forward(workload: Workload) -> Call:
    objective, approximation = workload.objective, KFAC(Fisher())
    return lambda: approximation.statistics(objective.at(workload.batch, linearize=False))


_OURS = (
    Subject(name=_STATISTICS, prepare=_statistics, most_repeats=5),
    Subject(name="curvlib: forward pass and statistics", prepare=_with_forward, most_repeats=5),
)
_CURVLINOPS = Subject(name="curvlinops: forward pass and statistics", prepare=by_curvlinops, most_repeats=5)
_BACKPACK = Subject(name="BackPACK: gradient and statistics", prepare=by_backpack, most_repeats=5)

CONVOLUTIONAL_STATISTICS = (
    Benchmark(
        name="kfac-resnet",
        title="K-FAC statistics, ResNet-18",
        problem=RESNET,
        subjects=(*_OURS, _CURVLINOPS),
        targets=(Target(subject=_STATISTICS, at_most=2.0),),
    ),
    Benchmark(
        name="kfac-resnet-large-stem",
        title="K-FAC statistics, ResNet-18 with the stem for large images",
        problem=RESNET_LARGE_STEM,
        subjects=(*_OURS, _CURVLINOPS),
    ),
    Benchmark(
        name="kfac-convnet",
        title="K-FAC statistics, convolutional chain",
        problem=CONVOLUTIONAL_CHAIN,
        subjects=(*_OURS, _CURVLINOPS, _BACKPACK),
        targets=(Target(subject=_STATISTICS, at_most=2.0),),
    ),
)
