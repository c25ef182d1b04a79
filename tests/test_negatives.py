"""Negatives: shapes, seeds, curricula, chains, and what a checkpoint keeps of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import batch_of, context_of

from ebm_guard import registry
from ebm_guard.data.outliers import GUARD_KINDS, SHIFT_KINDS, TRAINING_KINDS, make_outliers
from ebm_guard.energy import energy
from ebm_guard.errors import InvalidInputError
from ebm_guard.sampling import SGLD
from ebm_guard.training.context import TrainingBatch
from ebm_guard.training.negatives import (
    DataChains,
    Denoising,
    Descent,
    Mixed,
    Negatives,
    NoiseChains,
    Outliers,
    Replay,
    Synthetic,
    given_negatives,
    make_negatives,
)
from ebm_guard.training.negatives.chains import energy_of
from ebm_guard.training.negatives.descent import auroc, descend

ONE = context_of()


def images(n=40, seed=3):
    """Images that tell their number by their first value."""
    pixels = torch.from_numpy(np.random.default_rng(seed).uniform(0, 1, (n, 1, 4, 4)))
    pixels[:, 0, 0, 0] = torch.arange(n) / n
    return pixels


def numbers(pixels, n=40):
    return (pixels[:, 0, 0, 0] * n).round().long().tolist()


MAKERS = {
    "denoising": Denoising,
    "synthetic": Synthetic,
    "outliers": lambda: Outliers(images()),
    "descent": lambda: Descent(window=12, target=0.51, max_steps=3),
    "replay": lambda: Replay(SGLD.short_run(2), capacity=30),
    "data_chains": lambda: DataChains(SGLD.short_run(2)),
    "noise_chains": lambda: NoiseChains(SGLD.short_run(2)),
    "mixed": lambda: Mixed([(Outliers(images()), 1), (Synthetic(), 2)]),
}


def test_every_registered_source_has_a_case_here():
    assert {row.name for row in registry.methods("negatives")} == set(MAKERS)


@pytest.mark.parametrize("name", MAKERS)
def test_the_contract_of_negatives(name, tmp_path):
    """In the box, detached, no side effects, by seed and number, and a state that goes on."""
    negatives, context, batch = MAKERS[name](), context_of(update=0), batch_of()
    assert isinstance(negatives, Negatives)
    assert negatives.name == name
    assert registry.get("negatives", name).load() is type(negatives)
    negatives.begin(context, batch_of(30, seed=8))
    pixels, random = batch.pixels.clone(), torch.get_rng_state()
    drawn = negatives.draw(context, batch)
    assert drawn.shape == batch.pixels.shape
    assert drawn.dtype == batch.pixels.dtype
    assert not drawn.requires_grad
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
    assert torch.equal(pixels, batch.pixels)
    assert torch.equal(random, torch.get_rng_state())
    assert all(part.grad is None for part in context.net.parameters())
    assert not set(negatives.kinds) & {*GUARD_KINDS, *SHIFT_KINDS}
    negatives.observe(energy(context.logits(pixels)), energy(context.logits(drawn)))
    torch.save(negatives.state_dict(), tmp_path / "state.pt")
    other = MAKERS[name]()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for update in (1, 2):
        context.update = update
        assert torch.equal(other.draw(context, batch), negatives.draw(context, batch))
    assert other.settings() == negatives.settings()


@pytest.mark.parametrize("name", MAKERS)
def test_a_rollback_draws_afresh(name):
    negatives, context, batch = MAKERS[name](), context_of(update=0), batch_of()
    negatives.begin(context, batch)
    before = negatives.draw(context, batch)
    context.attempt = 1
    negatives.rolled_back(context)
    assert not torch.equal(before, negatives.draw(context, batch))


# --- Synthetic ------------------------------------------------------------------------------------


def test_each_kind_has_its_share_of_the_synthetic_outliers():
    """One kind alone equals make_outliers; together, each makes a third of the batch."""
    context, batch = context_of(), batch_of(12)
    alone = Synthetic(["patch_shuffle"]).draw(context, batch)
    for row, image in enumerate(alone):
        assert sorted(image.flatten().tolist()) == sorted(batch.pixels[row].flatten().tolist())
    drawn = Synthetic().draw(context, batch)
    shuffled = [
        sorted(image.flatten().tolist()) == sorted(batch.pixels[row].flatten().tolist())
        for row, image in enumerate(drawn)
    ]
    assert sum(shuffled) == 4
    assert Synthetic(per_image=3).draw(context, batch).shape == (36, 1, 4, 4)
    assert Synthetic().kinds == TRAINING_KINDS


def test_images_that_a_kind_leaves_as_they_are_go_to_another():
    context, batch = context_of(), batch_of(6)
    pixels = batch.pixels.clone()
    pixels[:5] = 0.25
    flat = TrainingBatch(pixels, batch.labels, pixels, batch.rows)
    drawn = Synthetic().draw(context, flat)
    assert drawn.shape == pixels.shape
    # No outlier is one of the plain images.
    assert not any(torch.equal(image, pixels[0]) for image in drawn)


def test_a_batch_that_no_kind_changes_is_refused():
    pixels = torch.full((4, 1, 4, 4), 0.5)
    labels = torch.tensor([0, 0, 0, 0])
    with pytest.raises(InvalidInputError, match="Give outliers of your own"):
        Synthetic().draw(context_of(), TrainingBatch(pixels, labels, pixels, labels))


@pytest.mark.parametrize("labels", [[0], [1, 1, 1], [-1, -1], [0, -1]], ids=str)
def test_any_labels_will_do(labels):
    batch = batch_of(len(labels), labels=labels)
    assert Synthetic().draw(context_of(), batch).shape == batch.pixels.shape


def test_bad_synthetic_settings_are_refused():
    with pytest.raises(InvalidInputError, match="did you mean 'blend'"):
        Synthetic(["blendd"])
    with pytest.raises(InvalidInputError, match="at least one kind"):
        Synthetic([])
    with pytest.raises(InvalidInputError, match="per_image=0"):
        Synthetic(per_image=0)


# --- Outliers -------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([2, 3]), st.integers(1, 2))
def test_processes_share_what_one_would_draw(n, share, world, per_image):
    source = Outliers(images()[:n], per_image=per_image)
    together = source.draw(ONE, batch_of(share * world))
    parts = [
        source.draw(replace(ONE, rank=rank, world=world), batch_of(share)) for rank in range(world)
    ]
    assert torch.equal(torch.cat(parts), together)


def test_no_outlier_comes_twice_before_all_have_come():
    drawn = Outliers(images(8)).draw(context_of(), batch_of(12))
    found = numbers(drawn, 8)
    assert sorted(found[:8]) == list(range(8))
    assert len(set(found[8:])) == 4


def test_outliers_as_bytes_or_from_a_source_are_the_same():
    class Source:
        def __len__(self):
            return 40

        def pixels(self, rows):
            return torch.from_numpy(levels.numpy()[rows]).double() / 255

    levels = (images() * 255).round().to(torch.uint8)
    context, batch = context_of(), batch_of()
    by_bytes = Outliers(levels).draw(context, batch)
    assert by_bytes.dtype == torch.float64
    assert torch.allclose(by_bytes, Outliers(Source()).draw(context, batch), atol=1e-7)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (torch.rand(3, 4, 4), r"\(N, C, H, W\)"),
        (torch.full((3, 1, 4, 4), -1.0), "Undo the normalisation"),
        (torch.full((3, 1, 4, 4), float("nan")), "needed"),
        (torch.rand(0, 1, 4, 4), "at least one image"),
        ([1, 2], "needed pixels"),
    ],
    ids=["axes", "range", "nan", "empty", "list"],
)
def test_bad_outliers_are_refused(bad, why):
    with pytest.raises(InvalidInputError, match=why):
        Outliers(bad)


def test_outliers_of_another_size_are_refused():
    with pytest.raises(InvalidInputError, match="the same channels and size"):
        Outliers(torch.rand(3, 1, 5, 5)).draw(context_of(), batch_of())


# --- Descent --------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
    st.lists(st.integers(0, 5), min_size=1, max_size=12),
)
def test_auroc_counts_pairs(data, off):
    pairs = [(1.0 if b > a else 0.5 if a == b else 0.0) for a in data for b in off]
    expected = sum(pairs) / len(pairs)
    assert auroc(torch.tensor(data), torch.tensor(off)) == pytest.approx(expected)


def test_descent_goes_down_in_steps_of_one_length():
    context = context_of()
    start = images(6) * 0.2 + 0.4
    follow = energy_of(context)
    for steps in range(1, 4):
        found = descend(context, start, steps, 0.01)
        leaf = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(follow(leaf).sum(), leaf)
        if steps == 1:
            rms = gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            assert torch.allclose(found, start - 0.01 * gradient / rms)
        length = (found - start).square().mean(dim=(1, 2, 3)).sqrt()
        assert float(length.max()) <= 0.01 * steps + 1e-9
    with torch.no_grad():
        assert bool((follow(found) < follow(start)).all())
    assert torch.equal(descend(context, start, 0, 0.01), start)
    assert float(descend(context, images(6), 50, 0.5).min()) >= 0


def test_the_curriculum_adds_a_step_for_each_window_that_is_told_apart():
    descent = Descent(max_steps=2, window=10, target=0.8)
    apart = torch.arange(10.0), torch.arange(10.0) + 20
    mixed = torch.arange(10.0), torch.arange(10.0)
    seen = []
    for data, off in (apart, mixed, apart, apart):
        descent.observe(data[:5], off[:5])
        seen.append(descent.steps)
        descent.observe(data[5:], off[5:])
        seen.append(descent.steps)
    # Nothing before a window is full, nothing at AUROC 1/2, and never more than max_steps.
    assert seen == [0, 1, 1, 1, 1, 2, 2, 2]
    descent.rolled_back(context_of())
    assert descent.steps == 1


def test_descent_draws_as_many_steps_as_the_curriculum_says():
    context, batch = context_of(), batch_of()
    descent = Descent(Outliers(images()))
    start = descent.draw(context, batch)
    descent.load_state_dict({**descent.state_dict(), "steps": 3})
    walked = descent.draw(context, batch)
    assert torch.equal(walked, descend(context, start, 3, descent.step_size))


@pytest.mark.parametrize(
    "bad",
    [{"max_steps": -1}, {"step_size": 0}, {"target": 1.0}, {"target": 0.5}, {"window": 1}],
    ids=str,
)
def test_bad_descent_settings_are_refused(bad):
    with pytest.raises(InvalidInputError, match=next(iter(bad))):
        Descent(**bad)


# --- Mixed ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(2, 16))
def test_mixed_fills_the_batch_by_shares(share, n):
    mixed = given_negatives(images(), Outliers(torch.zeros(4, 1, 4, 4)), share)
    drawn = mixed.draw(ONE, batch_of(n))
    assert len(drawn) == n
    assert int((drawn.abs().sum(dim=(1, 2, 3)) > 0).sum()) == pytest.approx(share * n, abs=0.5)


def test_mixed_shows_each_part_its_own_energies():
    parts = [Descent(window=4, target=0.6), Descent(window=4, target=0.6)]
    mixed = Mixed([(part, 1) for part in parts])
    mixed.observe(torch.zeros(8), torch.cat([torch.ones(4), -torch.ones(4)]))
    assert [part.steps for part in parts] == [1, 0]
    other = Mixed([(Descent(window=4, target=0.6), 1) for _ in range(2)])
    other.load_state_dict(mixed.state_dict())
    assert [part.steps for part in other.parts] == [1, 0]


def test_outliers_alone_where_their_share_is_one():
    assert isinstance(given_negatives(images(), share=1.0), Outliers)


def test_synthetic_blends_are_those_of_the_library():
    """A blend is the mean of two images of the batch of different classes."""
    context, batch = context_of(), batch_of(6)
    drawn = Synthetic(["blend"]).draw(context, batch)
    pairs = {
        (i, j): (batch.pixels[i] + batch.pixels[j]) / 2
        for i in range(6)
        for j in range(6)
        if batch.labels[i] != batch.labels[j]
    }
    for row, image in enumerate(drawn):
        assert any(torch.allclose(image, pairs[key]) for key in pairs if key[0] == row)
    reference = make_outliers(batch.pixels, "blend", np.random.default_rng(0), batch.labels)
    assert reference.shape == drawn.shape


@pytest.mark.parametrize(
    "make",
    [
        lambda: Replay(start="gausian"),
        lambda: Replay(reinit_prob=2),
        lambda: Replay(dtype="int4"),
        lambda: DataChains("sgld"),
        lambda: make_negatives("synthetik"),
        lambda: make_negatives(3),
        lambda: Mixed([]),
        lambda: Mixed([(Synthetic(), 0)]),
    ],
)
def test_bad_settings_are_refused_when_negatives_are_made(make):
    with pytest.raises(InvalidInputError, match="got"):
        make()
