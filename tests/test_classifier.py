"""The wrapped model: logits bit for bit, nothing of the model touched, wrong outputs refused."""

import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import Moody, inputs_of, linear, with_logits

from ebm_guard import EnergyClassifier, predict
from ebm_guard.errors import (
    EbmGuardWarning,
    InvalidInputError,
    ModelOutputError,
    UnsupportedModelError,
)
from ebm_guard.model.classifier import check_kind
from ebm_guard.model.mode import evaluation_mode
from ebm_guard.model.weights import weights_hash

WAIT = 30


def refused(model, *words, x=None, error=UnsupportedModelError, **settings):
    """Predicting with a model is refused, in words."""
    with pytest.raises(error) as caught:
        predict(EnergyClassifier(model, **settings), [inputs_of(8) if x is None else x])
    for word in words:
        assert word in str(caught.value)
    assert caught.value.exit_code == 4


class Gives(nn.Module):
    """Map the logits of a linear net to any output."""

    def __init__(self, output):
        super().__init__()
        self.net = linear()
        self.output = output
        self.eval()

    def forward(self, x):
        return self.output(self.net(x))


# --- logits, bit for bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_are_bit_identical(dtype):
    model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 5)).to(dtype).eval()
    x = inputs_of(33, dtype=dtype)
    got = EnergyClassifier(model)(x)
    assert got.dtype == dtype
    assert torch.equal(got, model(x))


def test_logits_with_features_are_bit_identical():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    x = inputs_of(33)
    classifier = EnergyClassifier(model)
    assert classifier.probe_head(x).found
    output = classifier.forward(x, features=True)
    assert torch.equal(output.logits, model(x))
    assert torch.allclose(output.features @ model[2].weight.T + model[2].bias, output.logits)


@pytest.mark.parametrize(
    ("output", "pick"),
    [
        (lambda z: z, None),
        (with_logits, None),
        (lambda z: {"logits": z, "loss": 0.0}, None),
        (lambda z: (z, "more"), lambda out: out[0]),
        (lambda z: {"scores": z}, lambda out: out["scores"]),
    ],
    ids=["tensor", "attribute", "key", "tuple", "other key"],
)
def test_where_the_logits_are_found(output, pick):
    model, x = Gives(output), inputs_of(7)
    assert torch.equal(EnergyClassifier(model, logits=pick)(x), model.net(x))


def test_a_plain_function_is_a_classifier():
    net = linear()
    classifier = EnergyClassifier(net.forward)
    x = inputs_of(5)
    assert torch.equal(classifier(x), net(x))
    assert classifier.device is None
    assert classifier.weights_hash() is None
    assert not classifier.probe_head(x).found


def test_gradients_flow_as_in_the_model():
    model, x = linear(), inputs_of(3).requires_grad_()
    EnergyClassifier(model).energy(x).sum().backward()
    expected = torch.autograd.grad((-model(x).logsumexp(1)).sum(), x)[0]
    assert torch.allclose(x.grad, expected)


# --- outputs that hold no logits


def test_probabilities_are_refused():
    refused(Gives(lambda z: z.softmax(1)), "probabilities", "sums to 1", "remove the final Softmax")


def test_log_probabilities_are_refused():
    refused(
        Gives(lambda z: z.log_softmax(1)), "log-probabilities", "logsumexp", "remove the final Log"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_in_half_precision_are_refused(dtype):
    refused(Gives(lambda z: z.softmax(1).to(dtype)), "probabilities")
    refused(Gives(lambda z: z.log_softmax(1).to(dtype)), "log-probabilities")


def test_logits_that_only_look_like_probabilities_pass():
    rows = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.2, 0.81]])
    check_kind(rows)
    check_kind(torch.tensor([[0.0, 0.0, 1.0], [2.0, -1.0, 0.0]]))


def test_probabilities_are_refused_beside_a_broken_row():
    rows = linear()(inputs_of(6)).softmax(1).detach()
    rows[2] = float("nan")
    with pytest.raises(UnsupportedModelError, match="probabilities"):
        check_kind(rows)


def test_tuple_is_refused():
    refused(Gives(lambda z: (z, z)), "tuple of 2", "needed logits (B, C)", "logits=lambda")


def test_mapping_without_logits_is_refused():
    refused(Gives(lambda z: {"out": z}), "keys ['out']", "logits=lambda")


def test_other_types_are_refused():
    refused(Gives(lambda z: z.detach().numpy()), "ndarray", "needed a tensor", "logits=lambda")
    refused(Gives(lambda z: None), "NoneType", "logits=lambda")


def test_logits_callable_that_gives_no_tensor_is_refused():
    refused(Gives(lambda z: z), "list", "torch tensor", logits=lambda out: out.tolist())


def test_one_logit_is_refused():
    refused(Gives(lambda z: z[:, :1]), "(8, 1)", "C >= 2", "torch.cat([torch.zeros_like(f), f]")


def test_images_out_are_refused():
    refused(Gives(lambda z: z[:, :, None, None]), "(8, 3, 1, 1)", "(B, C)")


def test_integers_are_refused():
    refused(Gives(lambda z: z.argmax(1, keepdim=True).expand(-1, 3)), "int64", "floating")


def test_wrong_number_of_rows_is_refused():
    refused(Gives(lambda z: z[:-1]), "7 rows", "8 inputs")


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_timm_model_without_classes_is_refused(name):
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=0).eval()
    with pytest.raises(UnsupportedModelError, match=r"num_classes=0.*features.*num_classes=10"):
        EnergyClassifier(model)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_timm_model_with_classes(name):
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=6).eval()
    with torch.no_grad():
        for parameter in model.get_classifier().parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    classifier = EnergyClassifier(model)
    assert classifier.probe_head(x).found
    output = classifier.forward(x, features=True)
    with torch.no_grad():
        assert torch.equal(output.logits, model(x))
    head = classifier.head
    rebuilt = output.features @ head.weight.T + head.bias
    assert (rebuilt - output.logits).abs().max() <= 1e-4 * output.logits.abs().max()


def test_multi_label_model_is_refused():
    model = linear()
    model.config = SimpleNamespace(problem_type="multi_label_classification")
    with pytest.raises(UnsupportedModelError, match=r"multi-label.*sigmoid.*softmax"):
        EnergyClassifier(model)


def test_single_label_config_is_accepted_and_names_the_classes():
    model = linear()
    model.config = SimpleNamespace(
        problem_type="single_label_classification", id2label={"1": "dog", "0": "cat", "2": "cow"}
    )
    assert EnergyClassifier(model).classes == ("cat", "dog", "cow")
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert EnergyClassifier(model).classes is None


def test_a_name_is_no_model():
    with pytest.raises(InvalidInputError, match=r"got str.*nn.Module.*create the model first"):
        EnergyClassifier("resnet50")


@pytest.mark.parametrize(
    ("tag", "warned"),
    [("a1_in1k", True), ("d_in1k", True), ("tv_in1k", False), ("augreg_in1k", False), ("", False)],
)
def test_tags_of_binary_cross_entropy(tag, warned):
    model = linear()
    model.pretrained_cfg = {"tag": tag, "architecture": "resnet50"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        EnergyClassifier(model)
    assert bool(caught) == warned
    if warned:
        message = str(caught[0].message)
        assert tag in message
        assert "binary cross-entropy" in message
        assert "if these are timm's published weights" in message
        assert caught[0].category is EbmGuardWarning


# --- the head: a module that runs twice, or not at all, is not read


def test_features_of_a_head_that_runs_twice_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = linear()
            self.twice = False

        def forward(self, x):
            if self.twice:
                self.fc(x)
            return self.fc(x)

    model = Twice().eval()
    classifier = EnergyClassifier(model)
    assert classifier.probe_head(inputs_of(8)).found
    model.twice = True
    with pytest.raises(ModelOutputError, match=r"ran 2 times.*exactly one"):
        classifier.forward(inputs_of(8), features=True)
    assert not model.fc._forward_pre_hooks


def test_probe_that_proves_nothing_is_repeated():
    classifier = EnergyClassifier(linear())
    same = inputs_of(1).expand(4, -1)
    assert not classifier.probe_head(inputs_of(1)).found
    assert not classifier.probe_head(same).found
    assert "vary by only" in classifier.head.message
    assert classifier.probe_head(inputs_of(4)).found


# --- the model is left as it was


def mixed():
    """A model whose parts are in different modes, as when somebody freezes a norm."""
    model = Moody().train()
    model.norm.eval()
    return model


@pytest.mark.filterwarnings("ignore::ebm_guard.errors.EbmGuardWarning")
def test_modes_statistics_and_gradients_are_restored():
    model = mixed()
    model.first.weight.requires_grad_(False)
    model.last.weight.grad = torch.ones_like(model.last.weight)
    model.last.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [part.training for part in model.modules()]
    asked = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [(len(p._forward_hooks), len(p._forward_pre_hooks)) for p in model.modules()]
    random = torch.get_rng_state()

    classifier = EnergyClassifier(model)
    classifier.probe_head(inputs_of(8))
    got = classifier.forward(inputs_of(8), features=True).logits

    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(got, mixed().eval()(inputs_of(8)))
    assert [part.training for part in model.modules()] == flags
    assert flags.count(True) == 4
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert torch.equal(model.last.weight.grad, torch.ones_like(model.last.weight))
    after = [(len(p._forward_hooks), len(p._forward_pre_hooks)) for p in model.modules()]
    assert after == hooks
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.filterwarnings("ignore::ebm_guard.errors.EbmGuardWarning")
def test_modes_are_restored_after_an_exception():
    model = mixed()
    flags = [part.training for part in model.modules()]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        EnergyClassifier(model)(torch.zeros(2, 9))
    assert [part.training for part in model.modules()] == flags
    assert torch.equal(EnergyClassifier(model)(inputs_of(8)), mixed().eval()(inputs_of(8)))


def test_train_mode_warns_once_and_says_what_to_do():
    classifier = EnergyClassifier(mixed())
    with pytest.warns(EbmGuardWarning, match=r"train mode.*lock.*model\.eval\(\)"):
        classifier(inputs_of(8))
    # A second warning would be an error here.
    classifier(inputs_of(8))


def in_threads(work, count=8):
    """Run ``work(i)`` in threads at once; return the results, or raise the first exception."""
    results, errors = [None] * count, []
    start = threading.Barrier(count)

    def one(index):
        try:
            start.wait(WAIT)
            results[index] = work(index)
        except BaseException as error:  # noqa: BLE001 - it is raised again below
            errors.append(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return results


@pytest.mark.filterwarnings("ignore::ebm_guard.errors.EbmGuardWarning")
def test_eight_threads_on_a_model_in_train_mode():
    model, classifier = mixed(), None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [part.training for part in model.modules()]
    classifier = EnergyClassifier(model)
    expected = [mixed().eval()(inputs_of(16, seed=i)) for i in range(8)]
    results = in_threads(lambda i: [classifier(inputs_of(16, seed=i)) for _ in range(20)])
    for index, logits in enumerate(results):
        assert all(torch.equal(item, expected[index]) for item in logits)
    assert [part.training for part in model.modules()] == flags
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Crossing(Moody):
    """A enters forward, B enters as well if it may, A leaves, and only then B goes on."""

    def __init__(self):
        super().__init__()
        self.a_inside, self.b_inside, self.a_done = (threading.Event() for _ in range(3))

    def forward(self, x):
        if threading.current_thread().name == "A":
            self.a_inside.set()
            # Where B has to wait for A, this wait runs out.
            self.b_inside.wait(0.5)
        else:
            self.b_inside.set()
            assert self.a_done.wait(WAIT)
        return super().forward(x)


def naive(model, x):
    """What must not be done: switch, run, restore, without a lock."""
    flags = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        return model(x)
    finally:
        for part, flag in flags:
            part.training = flag


def right_when_crossing(call, through=lambda model: model):
    """Whether A's logits, B's logits, and the flags after both are right."""
    model, out, x = Crossing().train(), {}, inputs_of(16)
    outer = through(model)

    def a():
        out["a"] = call(model, x)
        model.a_done.set()

    threads = [
        threading.Thread(target=a, name="A"),
        threading.Thread(target=lambda: out.update(b=call(outer, x)), name="B"),
    ]
    threads[0].start()
    assert model.a_inside.wait(WAIT)
    threads[1].start()
    for thread in threads:
        thread.join(WAIT)
    expected = Moody().eval()(x)
    flags = all(part.training for part in outer.modules())
    return [torch.equal(out["a"], expected), torch.equal(out["b"], expected), flags]


def wrapped(model, x):
    return EnergyClassifier(model)(x)


@pytest.mark.filterwarnings("ignore::ebm_guard.errors.EbmGuardWarning")
def test_calls_in_train_mode_take_turns():
    assert right_when_crossing(wrapped) == [True, True, True]


def test_a_switch_without_a_lock_fails_the_same_test():
    # B ran in train mode after A had put the flags back, and then "restored" A's eval flags.
    assert right_when_crossing(naive) == [True, False, False]


@pytest.mark.filterwarnings("ignore::ebm_guard.errors.EbmGuardWarning")
def test_a_model_and_a_wrapper_around_it_take_turns():
    assert right_when_crossing(wrapped, through=nn.Sequential) == [True, True, True]


@pytest.mark.filterwarnings("ignore::ebm_guard.errors.EbmGuardWarning")
def test_a_model_that_asks_another_one():
    """Both are in train mode, and the inner one is no part of the outer one."""
    inner = Moody().train()

    class Outer(Moody):
        def forward(self, x):
            return super().forward(x) + EnergyClassifier(inner)(x)

    outer = Outer().train()
    before = {name: value.clone() for name, value in inner.state_dict().items()}
    x = inputs_of(16)
    got = EnergyClassifier(outer)(x)
    assert all(torch.equal(before[name], value) for name, value in inner.state_dict().items())
    assert torch.equal(got, 2 * Moody().eval()(x))
    assert all(part.training for model in (inner, outer) for part in model.modules())
    # The turn is given back: the next call switches again.
    assert torch.equal(EnergyClassifier(inner)(x), Moody().eval()(x))


@pytest.mark.filterwarnings("ignore::ebm_guard.errors.EbmGuardWarning")
def test_an_eval_model_does_not_wait_for_another_model_in_train_mode():
    other, x = EnergyClassifier(linear()), inputs_of(8)
    inside, answered = threading.Event(), threading.Event()

    class Waits(Moody):
        def forward(self, x):
            inside.set()
            assert answered.wait(WAIT)
            return super().forward(x)

    model, out = Waits().train(), {}
    thread = threading.Thread(target=lambda: out.update(a=EnergyClassifier(model)(x)))
    thread.start()
    assert inside.wait(WAIT)
    assert torch.equal(other(x), linear()(x))
    answered.set()
    thread.join(WAIT)
    assert torch.equal(out["a"], Moody().eval()(x))


@pytest.mark.filterwarnings("ignore::ebm_guard.errors.EbmGuardWarning")
def test_a_late_reader_of_the_flags_does_not_run_unlocked():
    """B looks at the flags while A has them switched, and runs after A has put them back."""

    class Slow(Moody):
        def __init__(self):
            super().__init__()
            self.a_inside, self.b_started = threading.Event(), threading.Event()

        def forward(self, x):
            if threading.current_thread().name == "A":
                self.a_inside.set()
                assert self.b_started.wait(WAIT)
            return super().forward(x)

    def judged(call):
        model, out = Slow().train(), {}
        x = inputs_of(8)

        def b():
            assert model.a_inside.wait(WAIT)
            model.b_started.set()
            out["b"] = [call(model, x) for _ in range(20)]

        threads = [
            threading.Thread(target=lambda: out.update(a=call(model, x)), name="A"),
            threading.Thread(target=b, name="B"),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        expected = Moody().eval()(x)
        return all(torch.equal(item, expected) for item in [out["a"], *out["b"]]) and all(
            part.training for part in model.modules()
        )

    assert judged(lambda model, x: EnergyClassifier(model)(x))


def test_no_lock_in_eval_mode():
    """Two threads are inside forward at the same time: each waits there for the other."""

    class Meeting(Moody):
        def __init__(self):
            super().__init__()
            self.barrier = threading.Barrier(2)

        def forward(self, x):
            self.barrier.wait(WAIT)
            return super().forward(x)

    model = Meeting().eval()
    classifier = EnergyClassifier(model)
    expected = Moody().eval()(inputs_of(8))
    results = in_threads(lambda _: classifier(inputs_of(8)), count=2)
    assert all(torch.equal(item, expected) for item in results)


def test_no_flag_is_written_in_eval_mode():
    class Watched(nn.Linear):
        def __setattr__(self, name, value):
            if name == "training" and getattr(self, "armed", False):
                raise AssertionError("a flag was written")
            super().__setattr__(name, value)

    model = Watched(4, 3).eval()
    model.armed = True
    EnergyClassifier(model)(inputs_of(3))
    with evaluation_mode(model):
        pass


def test_hooks_of_other_threads_do_not_mix():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    classifier = EnergyClassifier(model)
    classifier.probe_head(inputs_of(8))

    def work(index):
        output = classifier.forward(inputs_of(4, seed=index), features=True)
        return output.features

    for index, features in enumerate(in_threads(work)):
        assert torch.equal(features, model[1](model[0](inputs_of(4, seed=index))))
    assert not model[2]._forward_pre_hooks


# --- the fingerprint of the weights


def conv():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))


def built():
    torch.manual_seed(0)
    model = conv()
    model(torch.zeros(2, 3, 8, 8))
    return model.eval()


def test_hash_ignores_wrappers_and_layout():
    model = built()
    plain = weights_hash(model)
    assert plain.startswith("sha256:")
    assert weights_hash(nn.DataParallel(model)) == plain
    compiled = torch.compile(model, backend="eager")
    assert next(iter(compiled.state_dict())).startswith("_orig_mod.")
    assert weights_hash(compiled) == plain
    assert weights_hash(nn.DataParallel(compiled)) == plain
    assert weights_hash(model.to(memory_format=torch.channels_last)) == plain
    model.train()
    model.requires_grad_(False)
    assert weights_hash(model) == plain


def test_hash_sees_one_bit_of_every_tensor():
    model = built()
    plain = weights_hash(model)
    for name, tensor in model.state_dict().items():
        flat = tensor.reshape(-1)[-1:].view(torch.uint8)
        flat[0] ^= 1
        assert weights_hash(model) != plain, name
        flat[0] ^= 1
    assert weights_hash(model) == plain


def test_hash_sees_names_shapes_and_dtypes():
    model = linear()
    plain = weights_hash(model)
    assert weights_hash(nn.Sequential(model)) != plain
    assert weights_hash(linear(dtype=torch.float64)) != plain
    turned = nn.Linear(3, 4, bias=False)
    turned.weight.data = torch.arange(12.0).reshape(4, 3)
    other = nn.Linear(4, 3, bias=False)
    other.weight.data = torch.arange(12.0).reshape(3, 4)
    assert weights_hash(turned) != weights_hash(other)


def test_hash_sees_both_of_two_names_that_differ_by_a_prefix():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = linear()
            self.module = nn.ModuleDict({"fc": linear(seed=9)})

    model = Pair()
    plain = weights_hash(model)
    for part in (model.fc, model.module["fc"]):
        with torch.no_grad():
            part.weight[0, 0] += 1
        assert weights_hash(model) != plain
        with torch.no_grad():
            part.weight[0, 0] -= 1


def test_models_without_state_have_no_hash():
    assert weights_hash(nn.Flatten()) is None
    assert weights_hash(lambda x: x) is None
