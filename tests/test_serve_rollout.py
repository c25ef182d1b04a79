"""Changing the artefact: a shadow beside the live one, and going forward and back."""

import collections
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

for extra in ("fastapi", "uvicorn", "httpx", "prometheus_client", "python_multipart"):
    pytest.importorskip(extra, reason="the extra `serve` is not installed")

from serving import (  # noqa: E402
    PNG,
    Hook,
    agrees,
    counts,
    decisions,
    fitted,
    image_of,
    in_parallel,
    png,
    post,
    served,
    until,
)
from toys import Pixels, logits_with  # noqa: E402

import ebm_guard  # noqa: E402
from ebm_guard import Guard  # noqa: E402
from ebm_guard.cli import run  # noqa: E402
from ebm_guard.deploy.serve import make_app  # noqa: E402
from ebm_guard.deploy.serve.identity import identity_of, saved_sha256  # noqa: E402
from ebm_guard.errors import InvalidInputError  # noqa: E402


def test_a_shadow_is_counted_and_never_answers(tmp_path):
    live = fitted(false_reject_rate=0.05)
    model = live.classifier.model
    other = fitted(model, seed=4, false_reject_rate=0.4)
    images = [image_of(index) for index in range(40)]
    one, two = live.predict(images), other.predict(images)
    pairs = collections.Counter(zip(one.accept.tolist(), two.accept.tolist(), strict=True))
    assert pairs[True, False] > 0

    def ask(client, image):
        return client.post(f"{url}/predict", content=png(image), headers=PNG).json()

    with served(live, shadow=other) as (url, state):
        replies = in_parallel(ask, images)
        until(lambda: shadowed(state) == 40)
        found = counts(url)
    for index, reply in enumerate(replies):
        assert set(reply) == {"artifact", "decisions"}
        assert reply["artifact"] == f"sha256:{identity_of(live).sha256}"
        agrees(reply["decisions"][0], one, index)
    for (a, b), count in pairs.items():
        words = ["accept" if flag else "reject" for flag in (a, b)]
        name = f'ebm_guard_shadow_rows_total{{live="{words[0]}",shadow="{words[1]}"}}'
        assert found[name] == count
    assert sum('role="shadow"' in name for name in found) == 1
    assert decisions(found)["accept"] == int(one.accept.sum())


def shadowed(state):
    table = state.service.metrics.registry.get_sample_value
    words = ("accept", "reject", "invalid")
    return sum(
        table("ebm_guard_shadow_rows_total", {"live": a, "shadow": b}) for a in words for b in words
    )


def test_a_shadow_of_another_model_and_one_that_raises_leave_the_answers_alone():
    def before(x):
        raise RuntimeError("shadow")

    broken = Hook(before)
    live, shadow = fitted(), fitted(broken, seed=2)
    expected = live.predict([image_of(5)])
    with served(live, shadow=shadow) as (url, state):
        metrics = state.service.metrics.registry.get_sample_value
        first = post(url, png(image_of(5)))
        until(lambda: shadowed(state) == 1)
        broken.arm()
        second = post(url, png(image_of(5)))
        until(lambda: metrics("ebm_guard_shadow_errors_total") == 1)
        third = post(url, png(image_of(5)))
    for reply in (first, second, third):
        agrees(reply.json()["decisions"][0], expected)


class InPlace(nn.Module):
    """Halves its input where it lies."""

    def __init__(self):
        super().__init__()
        self.inner = Pixels()
        self.pretrained_cfg = self.inner.pretrained_cfg
        self.eval()

    def forward(self, x):
        return self.inner(x.mul_(0.5))


def test_a_shadow_sees_what_came_and_not_what_the_live_model_left():
    seen = []
    hidden = Hook(lambda x: seen.append(x.clone()))
    live, shadow = fitted(InPlace()), fitted(hidden)
    hidden.arm()
    images = [image_of(index) for index in range(8)]
    with served(live, shadow=shadow) as (url, state):
        for image in images:
            post(url, png(image))
        until(lambda: shadowed(state) == 8)
    plain = ebm_guard.Preprocessing.from_model(hidden)
    pixels = torch.stack([torch.tensor(image.getpixel((0, 0))) for image in images]) / 255
    rows = plain.normalize(pixels[:, :, None, None].expand(-1, 3, 8, 8))
    torch.testing.assert_close(torch.cat(seen), rows)


def test_a_shadow_with_another_preprocessing_is_refused():
    """It would decide on inputs that were prepared for the guard that answers."""
    model = Pixels()
    live = fitted(model)
    own = ebm_guard.Preprocessing.from_model(model)
    rows = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(rows).argmax(dim=1)
    labels[::5] = (labels[::5] + 1) % 3
    for change, fits in (
        ({"source": "read elsewhere"}, True),
        ({"mean": (0.0, 0.0, 0.0)}, False),
        ({"crop_pct": 0.9}, False),
        ({"interpolation": "bicubic"}, False),
    ):
        other = ebm_guard.wrap(model, preprocessing=replace(own, **change)).fit([(rows, labels)])
        if fits:
            assert make_app(live, shadow=other).title == "ebm-guard"
            continue
        with pytest.raises(InvalidInputError, match="shadow with another preprocessing"):
            make_app(live, shadow=other)


def test_info_prints_the_hash_that_answers_carry(tmp_path, capsys):
    guard = fitted()
    path = guard.save(tmp_path / "guard.safetensors")
    with served(Guard.load(path, Pixels())) as (url, _):
        carried = post(url, png(image_of(1))).json()["artifact"]
        (name,) = (name for name in counts(url) if name.startswith("ebm_guard_artifact_info"))
    assert carried == f"sha256:{saved_sha256(path)}"
    assert carried.removeprefix("sha256:") in name
    assert run(["info", str(path)]) == 0
    assert carried in capsys.readouterr().out
    assert run(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identity"] == carried
    # Without a model, and for a guard of stored rows, too.
    for other in (Guard.load(path), ebm_guard.Guard().fit(logits_with(200))):
        again = other.save(tmp_path / "again.safetensors")
        assert saved_sha256(again) == identity_of(other).sha256


def test_an_identity_is_that_of_every_copy(tmp_path):
    guard = fitted()
    path = guard.save(tmp_path / "guard.safetensors")
    copy = Guard.load(path, guard.classifier.model)
    assert identity_of(copy) == identity_of(guard)
    assert identity_of(fitted(false_reject_rate=0.1)) != identity_of(guard)
    assert identity_of(fitted(seed=1)) != identity_of(guard)


def test_rolling_forward_and_back_gives_the_old_answers_again(tmp_path):
    paths = [
        fitted(false_reject_rate=rate).save(tmp_path / f"{rate}.safetensors")
        for rate in (0.05, 0.3)
    ]
    replies = []
    for path in (paths[0], paths[1], paths[0]):
        with served(Guard.load(path, Pixels())) as (url, _):
            replies.append([post(url, png(image_of(i))).json() for i in range(12)])
    assert replies[0] == replies[2]
    statuses = [[row["decisions"][0]["status"] for row in step] for step in replies]
    assert statuses[0] != statuses[1]
    assert {row["artifact"] for row in replies[0]}.isdisjoint(row["artifact"] for row in replies[1])
