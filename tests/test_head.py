"""The head finder on hand-made nets and timm's tiny ones, and the classifier around it."""

import threading
import warnings

import oracles
import pytest
import torch
from torch import nn

from ebm_guard.errors import EbmGuardWarning, ModelOutputError, UnsupportedModelError
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.head import capture_inputs

CLASSES = 5
TIMM = (
    "test_byobnet",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_resnet",
    "test_vit",
)


def seeded(net, *key):
    """Redraw all weights with a generator of their own: the global one is left alone."""
    generator = torch.Generator().manual_seed(int(oracles.generator(*key).integers(2**31)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return net.eval()


def batch(*shape):
    return torch.from_numpy(oracles.generator("batch", shape).normal(size=shape)).float()


class Plain(nn.Module):
    """The last layer has a usual name and is not the last one registered."""

    def __init__(self, bias=True):
        super().__init__()
        self.fc = nn.Linear(8, CLASSES, bias=bias)
        self.body = nn.Linear(6, 8)

    def forward(self, x):
        return self.fc(self.body(x).relu())


class ConvHead(nn.Module):
    """Pool, then a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.classifier = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        pooled = self.body(x).relu().mean((2, 3), keepdim=True)
        return self.classifier(pooled).flatten(1)


class ConvThenPool(nn.Module):
    """As SqueezeNet: the 1x1 convolution comes before the pooling, so features are maps."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.classifier = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        return self.classifier(self.body(x).relu()).mean((2, 3))


class TwoHeads(nn.Module):
    """As a distilled DeiT in eval mode: two heads on different inputs, averaged."""

    def __init__(self, bias=(True, True)):
        super().__init__()
        self.body = nn.Linear(6, 16)
        self.head = nn.Linear(8, CLASSES, bias=bias[0])
        self.head_dist = nn.Linear(8, CLASSES, bias=bias[1])

    def get_classifier(self):
        return self.head, self.head_dist

    def forward(self, x):
        first, second = self.body(x).relu().chunk(2, dim=1)
        return (self.head(first) + self.head_dist(second)) / 2


class NormLinear(nn.Module):
    """As LeViT: batch norm and linear layer in one head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, CLASSES))

    def forward(self, x):
        return self.head(self.body(x).relu())


class TwoNormHeads(nn.Module):
    """As a distilled LeViT: two of these, averaged."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
        self.head_dist = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, CLASSES))

    def forward(self, x):
        hidden = self.body(x).relu()
        return (self.head(hidden) + self.head_dist(hidden)) / 2


class Decoys(nn.Module):
    """Layers with C outputs and the best names run, but the logits come from elsewhere."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.out = nn.Linear(8, CLASSES)
        self.fc = nn.Linear(8, CLASSES)
        self.head = nn.Linear(CLASSES, CLASSES)
        self.unused = nn.Linear(8, CLASSES)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        hidden = self.body(x).relu()
        logits = self.out(hidden)
        self.last = self.head(self.fc(hidden))
        return logits


class NoHead(nn.Module):
    """A bilinear form of two embeddings, as a CLIP-like net with a learnt scale."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.body(x) ** 2


class Shared(nn.Module):
    """The same layer runs twice, so its input is ambiguous."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(CLASSES, CLASSES)

    def forward(self, x):
        return self.fc(self.fc(x[:, :CLASSES]).relu())


def sequential():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))


FOUND = [
    pytest.param(Plain, (16, 6), ("fc",), id="plain"),
    pytest.param(lambda: Plain(bias=False), (16, 6), ("fc",), id="no-bias"),
    pytest.param(sequential, (16, 6), ("2",), id="sequential"),
    pytest.param(lambda: nn.Linear(6, CLASSES), (16, 6), ("",), id="one-layer"),
    pytest.param(ConvHead, (16, 3, 6, 6), ("classifier",), id="1x1-conv"),
    pytest.param(TwoHeads, (16, 6), ("head", "head_dist"), id="two-heads"),
    pytest.param(
        lambda: TwoHeads((True, False)), (16, 6), ("head", "head_dist"), id="two-heads-one-bias"
    ),
    pytest.param(NormLinear, (16, 6), ("head.1",), id="norm-linear"),
    pytest.param(TwoNormHeads, (16, 6), ("head.1", "head_dist.1"), id="two-norm-heads"),
    pytest.param(Decoys, (16, 6), ("out",), id="decoys"),
]


@pytest.mark.parametrize(("make", "shape", "names"), FOUND)
def test_head_is_found_and_gives_the_logits(make, shape, names):
    net = seeded(make(), names)
    classifier = EnergyClassifier(net)
    x = batch(*shape)
    head = classifier.probe_head(x)
    assert head.found, head.message
    assert head.names == names
    assert "verified" in head.message
    assert classifier.head is head
    # Other rows than those of the probe, and one alone.
    for rows in (batch(7, *shape[1:]), batch(1, *shape[1:])):
        with torch.no_grad():
            output = classifier.forward(rows, features=True)
            rebuilt = output.features.double() @ head.weight.double().T + head.bias.double()
            plain = net(rows)
        assert torch.equal(output.logits, plain)
        assert output.features.ndim == 2
        assert output.features.shape[1] == head.weight.shape[1]
        assert head.weight.shape[0] == len(head.bias) == CLASSES
        error = (rebuilt - plain.double()).abs().max()
        assert error <= 1e-4 * plain.abs().max()
        # The same check can fail: the features of other rows do not give these logits.
        wrong = (output.features.double() + 1) @ head.weight.double().T + head.bias.double()
        assert (wrong - plain.double()).abs().max() > 1e-4 * plain.abs().max()


def test_two_heads_fold_exactly():
    net = seeded(TwoHeads(), "fold")
    classifier = EnergyClassifier(net)
    head = classifier.probe_head(batch(16, 6))
    assert torch.equal(head.weight, torch.cat([net.head.weight, net.head_dist.weight], 1) / 2)
    assert torch.equal(head.bias, (net.head.bias + net.head_dist.bias) / 2)
    assert "average of 2" in head.message


@pytest.mark.parametrize(
    ("make", "shape"),
    [(NoHead, (16, 6)), (ConvThenPool, (16, 3, 6, 6)), (Shared, (16, 6))],
)
def test_without_a_verified_head_logits_still_work(make, shape):
    net = seeded(make(), make.__name__)
    classifier = EnergyClassifier(net)
    x = batch(*shape)
    head = classifier.probe_head(x)
    assert not head.found
    assert "none of 1 executed linear layers with 5 outputs" in head.message
    assert "logit scores work" in head.message
    output = classifier.forward(x, features=True)
    assert output.features is None
    assert torch.equal(output.logits, net(x))


def test_a_plain_function_has_no_layers():
    classifier = EnergyClassifier(lambda x: x[:, :3])
    head = classifier.probe_head(batch(4, 6))
    assert not head.found
    assert "not an nn.Module" in head.message
    assert classifier.forward(batch(4, 6), features=True).features is None


def test_one_row_proves_nothing_and_a_later_batch_may():
    net = seeded(Plain(), "one row")
    classifier = EnergyClassifier(net)
    head = classifier.probe_head(batch(1, 6))
    assert not head.found
    assert "not verifiable: the probe batch has 1 row" in head.message
    assert classifier.probe_head(batch(2, 6)).names == ("fc",)


@pytest.mark.parametrize("scale", [0.0, 1e-9])
def test_logits_that_do_not_vary_prove_nothing(scale):
    net = seeded(Plain(), "constant")
    with torch.no_grad():
        net.fc.weight.mul_(scale)
    head = EnergyClassifier(net).probe_head(batch(16, 6))
    assert not head.found
    assert "not verifiable" in head.message
    assert "any layer would pass" in head.message


def test_equal_rows_prove_nothing():
    net = seeded(Plain(), "equal rows")
    head = EnergyClassifier(net).probe_head(batch(1, 6).repeat(8, 1))
    assert "not verifiable" in head.message


def test_all_zero_logits_prove_nothing():
    net = seeded(Plain(), "zero")
    with torch.no_grad():
        net.fc.weight.zero_()
        net.fc.bias.zero_()
    assert "not verifiable" in EnergyClassifier(net).probe_head(batch(16, 6)).message


def test_tiny_logits_that_vary_are_proof_enough():
    net = seeded(Plain(), "tiny")
    with torch.no_grad():
        net.fc.weight.mul_(1e-8)
        net.fc.bias.mul_(1e-8)
    assert EnergyClassifier(net).probe_head(batch(16, 6)).names == ("fc",)


def test_non_finite_logits_prove_nothing():
    net = seeded(Plain(), "nan")
    x = batch(8, 6)
    x[3, 2] = float("nan")
    head = EnergyClassifier(net).probe_head(x)
    assert "not verifiable: the logits of the probe batch are not finite" in head.message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    net = seeded(Plain(), "dtype").to(dtype)
    classifier = EnergyClassifier(net)
    assert classifier.probe_head(batch(16, 6).to(dtype)).names == ("fc",)


def hooks(net):
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in net.modules())


@pytest.mark.parametrize("make", [Plain, TwoHeads, Decoys, NoHead])
def test_no_hook_is_left(make):
    net = seeded(make(), "hooks")
    classifier = EnergyClassifier(net)
    classifier.probe_head(batch(8, 6))
    classifier.forward(batch(8, 6), features=True)
    assert hooks(net) == 0


def test_no_hook_is_left_when_the_model_fails():
    net = seeded(Plain(), "fails")
    classifier = EnergyClassifier(net)
    classifier.probe_head(batch(8, 6))
    with pytest.raises(RuntimeError):
        classifier.forward(batch(8, 5), features=True)
    with pytest.raises(RuntimeError):
        EnergyClassifier(net).probe_head(batch(8, 5))
    assert hooks(net) == 0


def test_the_users_own_hooks_stay():
    net = seeded(Plain(), "own hooks")
    seen = []
    net.fc.register_forward_pre_hook(lambda *_: seen.append(1))
    EnergyClassifier(net).probe_head(batch(8, 6))
    assert hooks(net) == 1
    assert seen == [1]


def test_other_threads_are_not_recorded():
    net = seeded(Plain(), "threads")
    mine, other = batch(4, 6), batch(9, 6)
    with capture_inputs([net.fc]) as inputs:
        thread = threading.Thread(target=net, args=(other,))
        thread.start()
        thread.join()
        assert inputs == {}
        net(mine)
    assert [len(rows) for rows in inputs[net.fc]] == [4]


def test_concurrent_calls_get_their_own_features():
    net = seeded(Plain(), "concurrent")
    classifier = EnergyClassifier(net)
    head = classifier.probe_head(batch(8, 6))
    sizes, failures = list(range(2, 10)), []

    def work(size):
        x = batch(size, 6)
        for _ in range(30):
            output = classifier.forward(x, features=True)
            rebuilt = output.features @ head.weight.T + head.bias
            if len(output.features) != size or not torch.allclose(rebuilt, net(x), atol=1e-4):
                failures.append(size)

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert hooks(net) == 0


def test_a_model_that_takes_another_path_later_is_an_error():
    class Skips(Plain):
        def forward(self, x):
            hidden = self.body(x).relu()
            return self.fc(hidden) if len(x) > 2 else hidden[:, :CLASSES]

    classifier = EnergyClassifier(seeded(Skips(), "skips"))
    assert classifier.probe_head(batch(8, 6)).found
    with pytest.raises(ModelOutputError, match="'fc' ran 0 times"):
        classifier.forward(batch(2, 6), features=True)


def test_a_model_in_train_mode_is_used_in_eval_mode_and_left_as_it_was():
    net = seeded(NormLinear(), "train mode")
    net.body = nn.Sequential(net.body, nn.Dropout(0.5))
    x = batch(16, 6)
    expected = net.eval()(x)
    net.train()
    net.head[0].eval()
    flags = [part.training for part in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    classifier = EnergyClassifier(net)
    with pytest.warns(EbmGuardWarning, match="train mode"):
        assert torch.equal(classifier(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(classifier(x), expected)
    assert [part.training for part in net.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_gradients_flow_and_parameters_are_untouched():
    net = seeded(Plain(), "gradient")
    x = batch(4, 6).requires_grad_()
    (gradient,) = torch.autograd.grad(EnergyClassifier(net).energy(x).sum(), x)
    assert gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("output", ["tuple", "dict", "one column", "none"])
def test_unusable_outputs_say_what_to_do(output):
    def model(x):
        logits = x[:, :3]
        return {
            "tuple": (logits, x),
            "dict": {"out": logits},
            "one column": x[:, :1],
            "none": None,
        }[output]

    with pytest.raises(UnsupportedModelError, match=r"logits"):
        EnergyClassifier(model)(batch(4, 6))


def test_logits_can_be_picked():
    x = batch(4, 6)
    assert torch.equal(EnergyClassifier(lambda x: (0, x), logits=lambda out: out[1])(x), x)
    assert torch.equal(EnergyClassifier(lambda x: {"logits": x})(x), x)


@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name):
    import timm

    net = timm.create_model(name, pretrained=False, num_classes=7).eval()
    generator = torch.Generator().manual_seed(int(oracles.generator(name).integers(2**31)))
    last = net.get_classifier()
    with torch.no_grad():
        # timm starts heads at or near zero, where any layer would pass.
        last.weight.copy_(0.02 * torch.randn(last.weight.shape, generator=generator))
    classifier = EnergyClassifier(net)
    size = net.pretrained_cfg["input_size"]
    x = torch.randn(3, *size, generator=generator)
    head = classifier.probe_head(x)
    assert head.layers == (last,), head.message
    with torch.no_grad():
        plain = net(x)
        output = classifier.forward(x, features=True)
        by_timm = net.forward_head(net.forward_features(x), pre_logits=True)
        rebuilt = output.features @ head.weight.T + head.bias
    assert torch.equal(output.logits, plain)
    assert torch.allclose(output.features, by_timm, atol=1e-5)
    assert torch.allclose(rebuilt, plain, atol=1e-4 * plain.abs().max().item())
    assert hooks(net) == 0
