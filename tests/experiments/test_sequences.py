"""Generated sequences and texts: what they hold, against a recomputation one element at a time, and their tasks."""

import dataclasses
import gzip
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvlib.experiments import (
    PROBLEMS,
    Addition,
    CharacterText,
    CopyMemory,
    ExperimentError,
    generate_addition,
    generate_copy,
)
from curvlib.experiments.sequence_tasks import (
    BitsPerCharacter,
    NextCharacter,
    Reproduction,
    ShareAdded,
    ShareCopied,
    Sum,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=40)
@given(length=st.integers(2, 25), seed=st.integers(0, 99))
def test_addition_marks_one_number_in_either_half_and_adds_them(length, seed):
    inputs, targets = generate_addition(6, length, seeded(seed))
    assert inputs.shape == (6, length, 2)
    assert targets.shape == (6, 1)
    for steps, (target,) in zip(inputs.tolist(), targets.tolist(), strict=True):
        marked = [t for t, (_, mark) in enumerate(steps) if mark == 1]
        assert all(mark in (0, 1) and 0 <= value < 1 for value, mark in steps)
        first, second = marked
        assert first < length // 2 <= second
        assert target == pytest.approx(sum(value * mark for value, mark in steps), abs=1e-6)


def test_addition_marks_every_position_and_has_the_variance_of_its_baseline():
    inputs, targets = generate_addition(4000, 7, seeded())
    frequency = inputs[..., 1].mean(0)
    # A frequency f of 4000 draws has a standard error sqrt(f (1 - f) / 4000) of at most 0.0075.
    torch.testing.assert_close(frequency, torch.tensor([1 / 3] * 3 + [1 / 4] * 4), atol=0.03, rtol=0)
    # The fourth central moment of the sum is 1/15, so the error of the mean is sqrt((1/15 - 1/36) / 4000) = 0.003.
    assert (targets - 1).square().mean().item() == pytest.approx(Addition().baseline.loss, abs=0.012)


@settings(max_examples=40)
@given(length=st.integers(1, 25), seed=st.integers(0, 99))
def test_copying_reproduces_the_symbols_after_the_signal(length, seed):
    inputs, targets = generate_copy(6, length, seeded(seed))
    assert inputs.shape == targets.shape == (6, length + 20)
    for given_symbols, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        memory = given_symbols[:10]
        assert set(memory) <= set(range(8))
        assert given_symbols == memory + [8] * (length - 1) + [9] + [8] * 10
        assert wanted == [8] * (length + 10) + memory
    assert given_symbols.index(9) == 9 + length


def test_copying_uses_the_whole_alphabet_and_has_the_loss_of_its_baseline():
    inputs, targets = generate_copy(2000, 5, seeded())
    frequency = inputs[:, :10].flatten().bincount() / 20_000
    torch.testing.assert_close(frequency, torch.full((8,), 1 / 8), atol=0.012, rtol=0)  # five standard errors
    logits = torch.full((2000, 9, 25), -1e9)
    logits[:, 8, :15] = 0
    logits[:, :8, 15:] = 0
    loss = Reproduction().loss(None)(logits, targets)
    assert loss.item() == pytest.approx(dataclasses.replace(CopyMemory(), length=5).baseline.loss, rel=1e-5)
    assert CopyMemory(length=80).baseline.loss == pytest.approx(math.log(8) / 10)


@pytest.mark.parametrize("source", [Addition(length=12, train_sequences=30, test_sequences=20),
                                    CopyMemory(length=3, train_sequences=30, test_sequences=20)],
                         ids=["addition", "copying"])  # fmt: skip
def test_generated_sources_are_the_same_ever_and_have_separate_tests(source):
    torch.manual_seed(1)
    train, test = source.load(None)
    torch.manual_seed(2)
    again, _ = source.load(None)
    assert torch.equal(train.inputs, again.inputs)
    assert torch.equal(train.targets, again.targets)
    assert (len(train.inputs), len(test.inputs)) == source.sizes == (30, 20)
    assert not torch.equal(train.inputs[:20], test.inputs)
    longer, _ = dataclasses.replace(source, length=15).load(None)
    assert longer.inputs.shape[1] == train.inputs.shape[1] + 15 - source.length
    with pytest.raises(ExperimentError, match=r"problem\.train_sequences must be an integer at least 1, got 0"):
        dataclasses.replace(source, train_sequences=0)


@pytest.mark.parametrize("generate", [generate_addition, generate_copy])
def test_generators_decide_everything(generate):
    first, second, other = (generate(5, 9, seeded(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_sum_counts_below_the_tolerance():
    targets = torch.tensor([[1.0], [1.0], [0.5], [0.5]])
    outputs = torch.tensor([[1.039], [0.961], [0.541], [0.459]])
    assert ShareAdded()(outputs, targets) == 0.5
    assert Sum().loss(None)(outputs, targets).item() == pytest.approx((2 * 0.039**2 + 2 * 0.041**2) / 4, rel=1e-4)


def test_only_the_reproduced_symbols_count():
    _, targets = generate_copy(8, 4, seeded())
    logits = torch.nn.functional.one_hot(targets, 9).movedim(2, 1).float()
    assert ShareCopied()(logits, targets) == 1
    logits[:, 0, :14] = 2
    assert ShareCopied()(logits, targets) == 1
    logits[:, 8, -2:] = 2
    assert ShareCopied()(logits, targets).item() == pytest.approx(0.8)


TEXT = "In the beginning was the word; and the wörd\n" * 4


@settings(max_examples=30)
@given(text=st.text(st.sampled_from("aBcß\n"), min_size=40, max_size=120), length=st.integers(1, 3))
def test_every_character_is_followed_by_its_target(tmp_path_factory, text, length):
    if len(set(text)) < 2:
        return
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(text.encode())
    train, test = CharacterText(length=length).load(path)
    alphabet = sorted(set(text))
    assert train.symbols == test.symbols == len(alphabet)
    boundary = len(text) - len(text) // 10
    for part, expected in ((train, text[:boundary]), (test, text[boundary:])):
        count = (len(expected) - 1) // length
        assert part.inputs.shape == part.targets.shape == (count, length)
        read = "".join(alphabet[code] for code in part.inputs.flatten())
        follows = "".join(alphabet[code] for code in part.targets.flatten())
        assert read == expected[: count * length]
        assert follows == expected[1 : count * length + 1]


def test_a_compressed_text_is_the_same_and_another_one_has_another_fingerprint(tmp_path):
    for name, content in (("a", TEXT.encode()), ("b", gzip.compress(TEXT.encode())), ("c", TEXT.upper().encode())):
        (tmp_path / name).write_bytes(content)
    plain, compressed, other = (CharacterText(length=8).load(tmp_path / name)[0] for name in "abc")
    assert torch.equal(plain.inputs, compressed.inputs)
    assert plain.fingerprint == compressed.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: give another with --data"),
        (gzip.compress(b""), "is empty: give another with --data"),
        (b"\xff\xfe\x00a", r"is no UTF-8 text \(byte 0: .*convert it, or give another"),
        (gzip.compress(TEXT.encode())[:40], "cannot be read .*check --data"),
        (gzip.compress(TEXT.encode())[:10] + b"garbage" * 9, "cannot be read .*check --data"),
        (b"abc" * 29 + b"ab", r"has 89 characters, which is too short: sequences of 8 need at least 90, a tenth"),
        (b"\n" * 200, r"repeats one character, '\\n'"),
    ],
    ids=["empty", "empty gzip", "no text", "cut gzip", "damaged gzip", "short", "one character"],
)
def test_texts_that_cannot_be_used_are_refused(tmp_path, content, message):
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(ExperimentError, match=message):
        CharacterText(length=8).load(tmp_path / "text")


def test_the_shortest_text_has_a_test_sequence(tmp_path):
    (tmp_path / "text").write_bytes(b"abc" * 30)
    train, test = CharacterText(length=8).load(tmp_path / "text")
    assert (len(train.inputs), len(test.inputs)) == (10, 1)


def test_a_text_that_is_not_there_is_named(tmp_path):
    for path, message in ((None, "none was given: use --data FILE"), (tmp_path, "is a folder: use --data FILE"),
                          (tmp_path / "x", "x does not exist: check --data")):  # fmt: skip
        with pytest.raises(ExperimentError, match=message):
            CharacterText().load(path)


def test_bits_are_logarithms_to_the_base_of_two():
    logits, targets = torch.zeros(3, 4, 5), torch.zeros(3, 5, dtype=torch.long)
    assert BitsPerCharacter()(logits, targets).item() == pytest.approx(2.0)
    logits = torch.randn(3, 4, 5, generator=seeded())
    expected = -logits.softmax(1)[:, 0].log2().mean()
    torch.testing.assert_close(BitsPerCharacter()(logits, targets), expected)
    torch.testing.assert_close(NextCharacter().loss(None)(logits, targets), expected * math.log(2))


def test_options_of_a_problem_change_what_they_say():
    addition = PROBLEMS.get("addition")
    changed = addition.with_options({"length": "9", "units": "5", "train_sequences": "40", "test_sequences": "30"})
    loaded = changed.load()
    assert loaded.train.inputs.shape == (40, 9, 2)
    assert loaded.test.inputs.shape == (30, 9, 2)
    assert changed.network.build()[1].hidden_size == 5
    assert changed.identity() != addition.identity()
    assert {entry.name: value for entry, value in changed.options()} == {
        "train_sequences": 40, "test_sequences": 30, "length": 9, "units": 5
    }  # fmt: skip
    assert addition.with_options({}) == addition
