"""Chains as negatives: from the data, from noise, persistent; of E(x) and of E(x, y)."""

import numpy as np
import pytest
import torch
from training_cases import CLASSES, batch_of, context_of

from ebm_guard.errors import NotFittedError
from ebm_guard.sampling import SGLD
from ebm_guard.training.negatives import DataChains, NoiseChains, Replay
from ebm_guard.training.negatives.chains import energy_of, spread_labels


def test_data_chains_start_at_the_batch_and_go_down():
    context, batch = context_of(), batch_of()
    still = DataChains(SGLD.short_run(0)).draw(context, batch)
    assert torch.equal(still, batch.pixels)
    moved = DataChains(SGLD.short_run(5)).draw(context, batch)
    follow = energy_of(context)
    with torch.no_grad():
        assert follow(moved).mean() < follow(batch.pixels).mean() - 0.01


def test_conditional_chains_go_down_the_energy_of_their_class():
    context, batch = context_of(), batch_of(labels=[0, 1, 2, -1] * 3)
    drawn = DataChains(SGLD.short_run(5), conditional=True).draw_labelled(context, batch)
    known = batch.labels >= 0
    assert torch.equal(drawn.labels[known], batch.labels[known])
    assert 0 <= int(drawn.labels.min()) <= int(drawn.labels.max()) < CLASSES
    follow = energy_of(context, drawn.labels)
    with torch.no_grad():
        assert follow(drawn.pixels).mean() < follow(batch.pixels).mean() - 0.01
        logits = context.logits(drawn.pixels)
    expected = torch.tensor([-float(row[y]) for row, y in zip(logits, drawn.labels, strict=True)])
    assert torch.allclose(follow(drawn.pixels).detach().float(), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 30])
def test_chains_are_spread_over_the_classes(n):
    counts = torch.bincount(spread_labels(context_of(), n), minlength=CLASSES)
    assert int(counts.sum()) == n
    assert int(counts.max() - counts.min()) <= 1


def test_replay_goes_on_where_chains_stopped():
    """As many slots as chains, no restart, no step: what was drawn comes back."""
    context, batch = context_of(update=0), batch_of(6)
    replay = Replay(SGLD.short_run(0), capacity=6, reinit_prob=0.0, dtype="float16")
    replay.begin(context, batch)
    first = replay.draw(context, batch)
    context.update = 1
    second = replay.draw(context, batch)
    assert not torch.equal(first, second)  # other order
    rows = [
        sorted(map(tuple, part.flatten(1).round(decimals=2).tolist())) for part in (first, second)
    ]
    assert np.allclose(rows[0], rows[1], atol=0.011)


def test_fresh_chains_look_like_their_class():
    """Class Gaussians: a bright quarter of the image tells the class."""
    context, batch = context_of(update=0), batch_of(60)
    replay = Replay(SGLD.short_run(0), conditional=True, capacity=60)
    replay.begin(context, batch)
    drawn = replay.draw_labelled(context, batch_of(60, seed=1))
    rows = drawn.pixels.mean(dim=(1, 3))[:, :CLASSES]
    assert float((rows.argmax(dim=1) == drawn.labels).float().mean()) > 0.7
    uniform = NoiseChains(SGLD.short_run(0), start="uniform")
    uniform.begin(context, batch)
    assert float(uniform.draw(context, batch).std()) == pytest.approx(12**-0.5, abs=0.03)


def test_processes_have_other_chains():
    batch = batch_of()
    drawn = []
    for rank in range(2):
        context = context_of(update=0, rank=rank, world=2)
        replay = Replay(SGLD.short_run(0))
        replay.begin(context, batch)
        drawn.append(replay.draw(context, batch))
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("kind", [Replay, NoiseChains])
def test_chains_that_were_not_begun_say_so(kind):
    with pytest.raises(NotFittedError, match="call begin"):
        kind().draw(context_of(), batch_of())
