"""Images without label: their place in a batch, and fine-tuning with them."""

import numpy as np
import pytest
import torch
from finetune_cases import quick
from hypothesis import given, settings
from hypothesis import strategies as st
from training_cases import batch_of, context_of

from ebm_guard.data.demo import load_demo
from ebm_guard.data.outliers import TRAINING_KINDS
from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.training import TrainingImages
from ebm_guard.training.context import TrainingBatch
from ebm_guard.training.negatives import Synthetic
from ebm_guard.training.objectives import make_objective
from ebm_guard.training.order import Order, shares


@given(
    n=st.integers(2, 60),
    known=st.integers(1, 60),
    size=st.integers(2, 40),
    share=st.floats(0.05, 1),
    seed=st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_every_image_comes_once_before_any_comes_twice(n, known, size, share, seed):
    labelled = np.sort(np.random.default_rng(seed).permutation(n)[: min(known, n)])
    order = Order(n, labelled, size, share, seed)
    drawn = [order.rows(update) for update in range(2 * n)]
    assert all(len(rows) == size for rows in drawn)
    inside = np.isin(np.arange(n), labelled)
    streams = [inside, ~inside] if len(labelled) < n else [np.ones(n, dtype=bool)]
    for member in streams:
        stream = np.concatenate([rows[member[rows]] for rows in drawn])
        count = int(member.sum())
        for begin in range(0, len(stream) - count + 1, count):
            assert len(set(stream[begin : begin + count].tolist())) == count
    again = Order(n, labelled, size, share, seed)
    assert np.array_equal(again.rows(3, attempt=1), order.rows(3, attempt=1))


@given(size=st.sampled_from([8, 24, 64]), share=st.floats(0.01, 1), parts=st.sampled_from([2, 4]))
def test_every_process_has_as_many_labelled_images(size, share, parts):
    # Else the mean over the processes of their means is not the mean.
    own, others = shares(size, share, parts)
    rows = Order(1000, np.arange(300), size, share, seed=0, processes=parts).rows(0)
    assert (rows < 300).sum() == own
    assert own + others == size
    counts = {int((part < 300).sum()) for part in np.split(rows, parts)}
    assert counts == {own // parts}
    assert 0 < own // parts < size // parts


def test_a_batch_too_small_for_the_processes_is_refused():
    with pytest.raises(InvalidInputError, match="batch_size=2 for 2 processes"):
        Order(4, np.array([0]), 2, 0.5, 0, processes=2)


def test_without_unlabelled_images_the_order_is_the_one_of_a_single_stream():
    n, seed = 10, 4
    expected = np.random.default_rng([seed, 41, 0, 0]).permutation(n)
    assert np.array_equal(Order(n, np.arange(n), n, 0.5, seed).rows(0), expected)


def test_a_batch_of_one_cannot_hold_both():
    with pytest.raises(InvalidInputError, match="batch_size=1"):
        Order(4, np.array([0]), 1, 0.5, 0)


def test_joined_images_are_those_of_both():
    rng = np.random.default_rng(0)
    first, second = (torch.from_numpy(rng.integers(0, 256, (n, 1, 4, 4), np.uint8)) for n in (5, 7))
    both = TrainingImages(first, torch.arange(5)).joined(TrainingImages(second, torch.arange(7)))
    assert len(both) == 12
    assert both.labels.tolist() == [0, 1, 2, 3, 4] + [-1] * 7
    assert both.labelled.tolist() == [0, 1, 2, 3, 4]
    whole = torch.cat([first, second]).float() / 255
    rows = rng.permutation(12).astype(np.int64)
    assert torch.equal(both.pixels(rows), whole[torch.from_numpy(rows)])
    some = both.select(rows[:6])
    again = np.array([5, 0, 3], dtype=np.int64)
    assert torch.equal(some.pixels(again), whole[torch.from_numpy(rows[:6][again])])
    assert torch.equal(some.labels, both.labels[torch.from_numpy(rows[:6])])
    assert both.in_memory
    assert both.pixels(np.empty(0, dtype=np.int64)).shape[0] == 0
    with pytest.raises(InvalidInputError, match=r"\(1, 4, 4\) and unlabelled ones \(1, 5, 5\)"):
        TrainingImages(first).joined(TrainingImages(torch.zeros(2, 1, 5, 5)))


@pytest.mark.parametrize("name", ["margin", "dat", "jem", "hdge", "cross_entropy", "adversarial"])
def test_unlabelled_rows_count_for_energies_and_not_for_the_class_loss(name):
    batch = batch_of(12)
    hidden = torch.where(torch.arange(12) < 6, batch.labels, -1)
    part = TrainingBatch(batch.pixels, hidden, batch.pixels, batch.rows)
    settings_ = {"num_steps": 2} if name == "jem" else {}
    context = context_of()
    objective = make_objective(name, **settings_)
    objective.begin(context, part)
    found = objective.loss(context, part)
    own = context.class_loss(context.logits(batch.pixels[:6]), batch.labels[:6])
    if name != "adversarial":
        assert found.parts["class"] == pytest.approx(float(own.detach()))
    assert len(found.energy_data) == 12


def test_blends_have_partners_of_any_class_where_labels_are_missing():
    batch = batch_of(6)
    hidden = TrainingBatch(batch.pixels, torch.full((6,), -1), batch.pixels, batch.rows)
    made = Synthetic(["blend"]).draw(context_of(), hidden)
    assert made.shape == batch.pixels.shape
    assert "blend" in TRAINING_KINDS


def demo_parts(labels=60):
    train = load_demo("train")
    known = np.asarray(train.labels).copy()
    known[labels:] = -1
    return train.images, known


def test_fine_tuning_with_unlabelled_images_tells_and_goes_through_the_same_test():
    images, labels = demo_parts()
    result = quick(train=(images, labels), updates=6, objective="margin", labelled_share=0.25)
    assert any("have no label: every batch takes" in line for line in result.story)
    assert result.status in ("accepted", "start returned")
    assert result.settings["labelled_share"] == 0.25
    apart = quick(
        train=(images[:60], labels[:60]),
        unlabelled=images[60:],
        updates=6,
        objective="margin",
        labelled_share=0.25,
    )
    lines = [
        [line["loss"] for line in each.history if line["kind"] == "update"]
        for each in (result, apart)
    ]
    assert lines[0] == lines[1]


def test_labels_that_are_needed_are_asked_for():
    images, labels = demo_parts(labels=1)
    with pytest.raises(DataError, match=r"1 of .* images have a label"):
        quick(train=(images, labels), updates=2)


def test_epochs_count_the_images_with_a_label():
    images, labels = demo_parts(labels=64)
    result = quick(train=(images, labels), epochs=2, batch_size=16)
    # 8 of 16 have a label: 64 images twice take 16 updates.
    assert result.settings["updates"] == 16


def test_unlabelled_images_that_are_labelled_too_are_counted():
    images, labels = demo_parts()
    result = quick(train=(images[:60], labels[:60]), unlabelled=images[40:100], updates=2)
    assert any("20 of the images without label are among those" in line for line in result.story)


def test_entropy_without_unlabelled_images_says_that_it_waits_in_vain():
    result = quick(updates=2, regularisers="entropy")
    assert any(
        "entropy acts on images without label, and there are none" in x for x in result.story
    )


@pytest.mark.parametrize("given", [None, 3, {"dsm": 1}])
def test_regularisers_are_names_in_a_list(given):
    with pytest.raises(InvalidInputError, match="in a list"):
        quick(updates=2, regularisers=given)
