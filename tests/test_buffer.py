"""The replay buffer: no slot twice, classes apart, restarts, rounding that is right on average."""

import json

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import QUICK
from scipy import stats

from ebm_guard.errors import DataError, InvalidInputError
from ebm_guard.sampling import ClassGaussian, ReplayBuffer, UniformStart
from ebm_guard.sampling.starts import Start

SHAPE = (1, 4, 4)
LEVEL = 1e-3


class Marked(Start):
    """Fresh chains that can be told apart: all values are the label, over 10."""

    name, shape = "marked", SHAPE

    def draw(self, labels, generator):
        values = torch.full((labels,), 0.5) if isinstance(labels, int) else labels / 10
        return values[:, None, None, None].expand(-1, *SHAPE)

    def settings(self):
        return {"start": self.name}


def points_of(n, *names):
    return torch.from_numpy(oracles.generator("points", *names).random((n, *SHAPE))).float()


@given(
    capacity=st.integers(1, 40),
    classes=st.none() | st.integers(1, 4),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@QUICK
def test_a_draw_holds_no_slot_twice_and_keeps_classes_apart(capacity, classes, seed, data):
    buffer = ReplayBuffer(SHAPE, capacity=capacity, num_classes=classes, seed=seed)
    assert capacity <= buffer.capacity < capacity + (classes or 1)
    labels = None
    if classes is None:
        n = data.draw(st.integers(1, buffer.capacity))
    else:
        counts = data.draw(
            st.lists(st.integers(0, buffer.per_class), min_size=classes, max_size=classes).filter(
                any
            )
        )
        order = [label for label, count in enumerate(counts) for _ in range(count)]
        labels = torch.tensor(data.draw(st.permutations(order)))
        n = len(labels)
    for _ in range(2):
        drawn = buffer.draw(n, labels)
        slots = drawn.slots.tolist()
        assert len(set(slots)) == len(slots) == n
        assert 0 <= min(slots) <= max(slots) < buffer.capacity
        if labels is not None:
            assert torch.equal(drawn.labels, labels)
            assert torch.equal(drawn.slots // buffer.per_class, labels)
        buffer.store(drawn.slots, drawn.points)


def test_every_slot_is_drawn_equally_often():
    buffer = ReplayBuffer(SHAPE, capacity=20)
    counts = torch.zeros(20)
    for _ in range(1000):
        counts[buffer.draw(5).slots] += 1
    # Without replacement, counts vary by the factor 1 - 5/20 of the multinomial's.
    spread = float((counts - 250).square().sum() / 250) / (1 - 5 / 20)
    assert stats.chi2.sf(spread * 19 / 20, 19) > LEVEL


def test_chains_come_back_to_their_class_and_go_on():
    buffer = ReplayBuffer(SHAPE, capacity=12, num_classes=3, start=Marked(), reinit_prob=0.0)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    first = buffer.draw(12, labels)
    assert first.fresh.all()
    assert torch.allclose(first.points.mean(dim=(1, 2, 3)), labels / 10)
    buffer.store(first.slots, first.points + 0.05)
    second = buffer.draw(12, labels)
    assert not second.fresh.any()
    gap = second.points.mean(dim=(1, 2, 3)) - (labels / 10 + 0.05)
    assert gap.abs().max() <= 1 / 255


@pytest.mark.parametrize("reinit_prob", [0.0, 0.05, 1.0])
def test_the_share_that_starts_anew(reinit_prob):
    buffer = ReplayBuffer(SHAPE, capacity=50, reinit_prob=reinit_prob, start=Marked())
    buffer.store(torch.arange(50), torch.zeros(50, *SHAPE))
    fresh = total = 0
    for _ in range(60):
        drawn = buffer.draw(50)
        anew = (drawn.points == 0.5).flatten(1).all(dim=1)
        assert torch.equal(anew, drawn.fresh)
        fresh, total = fresh + int(anew.sum()), total + 50
    assert stats.binomtest(fresh, total, reinit_prob).pvalue > LEVEL


def test_labels_are_drawn_evenly_where_none_are_asked_for():
    buffer = ReplayBuffer(SHAPE, capacity=4000, num_classes=4)
    labels = buffer.draw(1000).labels
    assert stats.chisquare(torch.bincount(labels, minlength=4).numpy()).pvalue > LEVEL


def test_uint8_is_right_on_average_and_float16_nearly_exact():
    value = 100.3 / 255
    points = torch.full((2000, *SHAPE), value)
    buffer = ReplayBuffer(SHAPE, capacity=2000, reinit_prob=0.0)
    buffer.store(torch.arange(2000), points)
    levels = buffer.draw(2000).points * 255
    up = int((levels.round() == 101).sum())
    assert int((levels.round() == 100).sum()) == levels.numel() - up
    assert stats.binomtest(up, levels.numel(), 0.3).pvalue > LEVEL
    # Rounding to the nearest level would give the share 0.
    assert stats.binomtest(0, levels.numel(), 0.3).pvalue < LEVEL
    half = ReplayBuffer(SHAPE, capacity=2000, reinit_prob=0.0, dtype="float16")
    half.store(torch.arange(2000), points)
    assert (half.draw(5).points - value).abs().max() < 2.5e-4


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
def test_the_edges_of_the_box_stay_where_they_are(dtype):
    buffer = ReplayBuffer(SHAPE, capacity=2, reinit_prob=0.0, dtype=dtype)
    edges = torch.stack([torch.zeros(SHAPE), torch.ones(SHAPE)])
    for _ in range(20):
        buffer.store(torch.arange(2), edges)
    drawn = buffer.draw(2)
    assert torch.equal(drawn.points, edges[drawn.slots])


def test_white_never_becomes_black():
    # 255 + u rounds to 256 once in 2^17 draws of u, and 256 as uint8 is 0.
    buffer = ReplayBuffer((1, 64, 64), capacity=1000, reinit_prob=0.0)
    buffer.store(torch.arange(1000), torch.ones(1000, 1, 64, 64))
    assert buffer.state_dict()["points"].min() == 255


@pytest.mark.parametrize("dtype", ["uint8", "float16"])
@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_the_state_goes_on_bit_by_bit(tmp_path, dtype, start):
    origin = UniformStart(SHAPE)
    if start == "gaussian":
        origin = ClassGaussian().fit(points_of(40), torch.arange(40) % 3)
    buffer = ReplayBuffer(SHAPE, capacity=30, num_classes=3, dtype=dtype, start=origin, seed=7)

    def go_on(buffer, steps):
        drawn = None
        for _ in range(steps):
            drawn = buffer.draw(6, torch.tensor([0, 1, 2, 0, 1, 2]))
            buffer.store(drawn.slots, (drawn.points * 0.9 + 0.03).clamp(0, 1))
        return drawn

    go_on(buffer, 5)
    path = tmp_path / "state.pt"
    torch.save(buffer.state_dict(), path)
    state = torch.load(path, weights_only=True)
    json.dumps(state["settings"])
    again = ReplayBuffer.from_state(state)
    loaded = ReplayBuffer(SHAPE, capacity=30, num_classes=3, dtype=dtype, start=origin, seed=7)
    loaded.load_state_dict(state)
    expected = go_on(buffer, 9)
    for other in (again, loaded):
        found = go_on(other, 9)
        assert torch.equal(found.points, expected.points)
        assert torch.equal(found.slots, expected.slots)
        assert torch.equal(other.state_dict()["points"], buffer.state_dict()["points"])
    assert again.settings() == buffer.settings()


def test_a_state_is_a_copy_and_belongs_to_one_buffer():
    buffer = ReplayBuffer(SHAPE, capacity=10)
    state = buffer.state_dict()
    buffer.store(torch.arange(10), torch.ones(10, *SHAPE))
    assert not state["points"].any()
    other = ReplayBuffer(SHAPE, capacity=11, seed=3)
    with pytest.raises(DataError, match="capacity 10, here 11, seed 0, here 3"):
        other.load_state_dict(state)


def test_reseeding_empties_and_draws_other_numbers():
    buffer = ReplayBuffer(SHAPE, capacity=40, reinit_prob=0.0)
    first = buffer.draw(10)
    buffer.store(first.slots, first.points)
    buffer.reseed()
    assert len(buffer) == 0
    again = buffer.draw(10)
    assert again.fresh.all()
    assert not torch.equal(again.slots, first.slots)
    buffer.reseed(0)
    assert torch.equal(buffer.draw(10).points, first.points)


def test_ranks_and_seeds_have_numbers_of_their_own_and_global_ones_are_left_alone():
    state = torch.get_rng_state()
    draws = [
        ReplayBuffer(SHAPE, capacity=40, seed=seed, rank=rank).draw(10).points
        for seed, rank in [(0, 0), (0, 1), (1, 0), (0, 0)]
    ]
    assert torch.equal(draws[0], draws[3])
    assert not any(torch.equal(draws[0], other) for other in draws[1:3])
    assert torch.equal(torch.get_rng_state(), state)


def test_capacity_by_bytes():
    each = 3 * 224 * 224
    assert ReplayBuffer((3, 224, 224), max_bytes=10 * each).capacity == 10
    assert ReplayBuffer((3, 224, 224), max_bytes=10 * each, dtype="float16").capacity == 5
    assert ReplayBuffer((3, 224, 224), max_bytes=10 * each, num_classes=3).capacity == 9
    small = ReplayBuffer((3, 8, 8), capacity=7, max_bytes=2**20)
    assert small.capacity == 7
    assert small.nbytes == 7 * 192
    assert ReplayBuffer((1, 8, 8)).capacity == 10_000
    with pytest.raises(InvalidInputError, match="of each of 3 classes takes 451584 bytes"):
        ReplayBuffer((3, 224, 224), max_bytes=1000, num_classes=3)


def test_what_cannot_be_done_is_refused():
    buffer = ReplayBuffer(SHAPE, capacity=6, num_classes=2)
    with pytest.raises(InvalidInputError, match="4 chains of one class to draw from 3 slots"):
        buffer.draw(4, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InvalidInputError, match=r"labels 0\.\.2"):
        buffer.draw(2, torch.tensor([0, 2]))
    with pytest.raises(InvalidInputError, match="whole numbers"):
        buffer.draw(2, torch.tensor([0.0, 1.0]))
    with pytest.raises(InvalidInputError, match="without num_classes"):
        ReplayBuffer(SHAPE, capacity=6).draw(2, torch.tensor([0, 1]))
    with pytest.raises(InvalidInputError, match="a slot twice"):
        buffer.store(torch.tensor([1, 1]), torch.zeros(2, *SHAPE))
    for bad in (torch.full((1, *SHAPE), 1.01), torch.full((1, *SHAPE), torch.nan)):
        with pytest.raises(InvalidInputError, match="outside"):
            buffer.store(torch.tensor([0]), bad)
    with pytest.raises(InvalidInputError, match="points"):
        buffer.store(torch.tensor([0]), torch.zeros(1, 2, 2, 2))
    for settings in (
        {"dtype": "float32"},
        {"reinit_prob": 1.5},
        {"capacity": 0},
        {"num_classes": 0},
        {"seed": -1},
    ):
        with pytest.raises(InvalidInputError, match=next(iter(settings))):
            ReplayBuffer(SHAPE, **settings)
    with pytest.raises(InvalidInputError, match="a start of shape"):
        ReplayBuffer(SHAPE, start=UniformStart((1, 8, 8)))
    with pytest.raises(InvalidInputError, match="an unfitted one has none"):
        ReplayBuffer(SHAPE, start=ClassGaussian())
