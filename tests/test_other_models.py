"""Models that others make: torchvision, TorchScript, exported, compiled, wrapped, half precision.

Models that need packages which CI lacks are in ``test_other_models_extra.py``.
"""

import shutil
import warnings

import pytest
import timm
import torch
import torchvision
from foreign import CLASSES, convnet, images, keeps_its_promises, redrawn
from torch import nn
from torch.export import Dim

import ebm_guard
from ebm_guard.errors import ArtifactError, EbmGuardWarning, UnsupportedModelError
from ebm_guard.model import EnergyClassifier
from ebm_guard.model.head import capture_inputs
from ebm_guard.model.weights import weights_hash
from ebm_guard.model.wrappers import eager_run, unwrapped

HEAD = ("8",)
DEPRECATED = "ignore:.*torch.jit"
TRAIN_MODE = "ignore:the model is in train mode:ebm_guard.errors.EbmGuardWarning"


@torch.no_grad()
def truth(model, x):
    """Return the logits of the model itself, which is in eval mode."""
    return model(x)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small batches are fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "guard.safetensors"


@pytest.fixture
def dynamo():
    """Compiled code does not outlive a test."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# --- torchvision


def from_torchvision(name, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **settings)


def small_vgg():
    """VGG's shape, head and names, without its 133 M parameters."""
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    model = torchvision.models.VGG(features, num_classes=CLASSES, dropout=0.5)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier[0] = nn.Linear(8 * 4, 16)
    model.classifier[3] = nn.Linear(16, 16)
    model.classifier[6] = nn.Linear(16, CLASSES)
    return model


def small_vit():
    return torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=16,
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        num_classes=CLASSES,
    )


TORCHVISION = {
    "resnet18": (lambda: from_torchvision("resnet18"), 32, ("fc",)),
    "mobilenet_v3_small": (lambda: from_torchvision("mobilenet_v3_small"), 32, ("classifier.3",)),
    # These two have auxiliary heads, and return tuples in train mode.
    "googlenet": (
        lambda: from_torchvision("googlenet", init_weights=False, aux_logits=True),
        64,
        ("fc",),
    ),
    "inception_v3": (
        lambda: from_torchvision("inception_v3", init_weights=False, aux_logits=True),
        75,
        ("fc",),
    ),
    "vgg": (small_vgg, 16, ("classifier.6",)),
    "vit": (small_vit, 32, ("heads.head",)),
    # The 1x1 convolution comes before ReLU and pooling: not linear in pooled features.
    "squeezenet1_1": (lambda: from_torchvision("squeezenet1_1"), 64, None),
}


@pytest.mark.filterwarnings(TRAIN_MODE)
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name, place):
    make, size, names = TORCHVISION[name]
    model = redrawn(make())
    x = images(n=12, size=size)
    expected = truth(model, x)
    model.train()  # as a constructor hands it out
    keeps_its_promises(model, x, expected, place, names=names, message="none of 1 executed")


# --- plain containers and callables


@pytest.mark.filterwarnings(TRAIN_MODE)
@pytest.mark.parametrize("training", [False, True])
def test_sequential(place, training):
    model, x = convnet(), images()
    expected = truth(model, x)
    keeps_its_promises(model.train(training), x, expected, place, names=HEAD)


def test_any_callable(place):
    net, x = convnet(), images()

    def classify(batch):
        return {"logits": net(batch)}

    message = "a function is not an nn.Module: no layers to look at"
    guard = keeps_its_promises(classify, x, truth(net, x), place, message=message)
    assert guard.classifier.weights_hash() is None
    with pytest.raises(ArtifactError, match="was fitted on classify"):
        ebm_guard.Guard.load(place, convnet(seed=3))
    # Nothing but the stored inputs can know that this is another function.
    other = convnet(seed=3).forward
    with pytest.raises(ArtifactError, match="stored"):
        ebm_guard.Guard.load(place, other)


# --- TorchScript and exported programs


def scripted(model, x):
    return torch.jit.script(model)


def traced(model, x):
    return torch.jit.trace(model, x)


def frozen(model, x):
    return torch.jit.freeze(torch.jit.script(model))


@pytest.mark.filterwarnings(DEPRECATED, TRAIN_MODE)
@pytest.mark.parametrize("make", [scripted, traced, frozen])
def test_torchscript(make, place):
    plain, x = convnet(), images()
    model = make(plain, x)
    # TorchScript may fuse and change the last bits after its first runs: those are the model's own.
    for _ in range(3):
        expected = truth(model, x)
    assert torch.allclose(expected, truth(plain, x), atol=1e-5)
    guard = keeps_its_promises(model, x, expected, place, message="TorchScript hides its layers")
    if make is not frozen:
        assert guard.classifier.name == "Sequential"
        assert guard.classifier.weights_hash() == weights_hash(plain)


@pytest.mark.filterwarnings(DEPRECATED, TRAIN_MODE)
def test_torchscript_in_train_mode(place):
    plain, x = convnet(), images()
    expected = truth(plain, x)
    model = torch.jit.script(plain.train())
    message = "TorchScript hides its layers"
    keeps_its_promises(model, x, expected, place, message=message)


@pytest.mark.filterwarnings(DEPRECATED)
def test_a_scripted_body_under_a_python_head():
    """Only the scripted part is closed."""
    plain, x = convnet(), images()
    model = nn.Sequential(torch.jit.script(plain[:5]), *plain[5:]).eval()
    assert EnergyClassifier(model).probe_head(x).names == ("4",)


def exported(model, x):
    return torch.export.export(model, (x,), dynamic_shapes=({0: Dim("rows", min=2, max=512)},))


def test_exported_program(place):
    plain, x = convnet(), images()
    program = exported(plain, x)
    model = program.module()
    with pytest.raises(NotImplementedError):
        model.eval()
    # Its flags say "train mode" and mean nothing: a warning would be an error here.
    assert model.training
    guard = keeps_its_promises(model, x, truth(model, x), place, message="an exported program")
    assert torch.equal(guard(x).label, truth(plain, x).argmax(dim=1))
    assert guard.classifier.weights_hash() == weights_hash(plain)
    inside = nn.Sequential(model)
    inside.training = False
    assert torch.equal(EnergyClassifier(inside)(x), truth(model, x))
    with pytest.raises(UnsupportedModelError, match=r"program\.module\(\)"):
        ebm_guard.wrap(program)


# --- torch.compile


def wrapped_compile(model, backend):
    return torch.compile(model, backend=backend)


def in_place_compile(model, backend):
    model.compile(backend=backend)
    return model


def compiled_forward(model, backend):
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def compiled_in_parallel(model, backend):
    return nn.DataParallel(torch.compile(model, backend=backend)).eval()


def compiled_from_parallel(model, backend):
    return torch.compile(nn.DataParallel(model).eval(), backend=backend)


COMPILED = [
    wrapped_compile,
    in_place_compile,
    compiled_forward,
    compiled_in_parallel,
    compiled_from_parallel,
]


@pytest.mark.filterwarnings(TRAIN_MODE)
@pytest.mark.parametrize("make", COMPILED)
@pytest.mark.parametrize("training", [False, True])
def test_compiled_model(make, training, place, dynamo):
    plain, x = convnet(), images()
    model = make(plain, "eager")
    expected = truth(model, x)
    model.train(training)
    keeps_its_promises(model, x, expected, place, names=HEAD)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_hooks_do_not_enter_compiled_code(dynamo):
    """A hook that is there when Dynamo compiles changes what it compiles, for good."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    x = images()
    model = torch.compile(convnet(), backend=backend)
    classifier = EnergyClassifier(model)
    assert classifier.probe_head(x).names == HEAD
    classifier.forward(x, features=True)
    truth(model, x)
    with torch.no_grad():
        classifier(x)
    # One for each of grad mode on (features) and off.
    assert len(graphs) == 2
    # The check can fail: with hooks on it, the same model is not compiled as one graph.
    torch.compiler.reset()
    graphs.clear()
    with capture_inputs([unwrapped(model)[-1]]):
        truth(model, x)
    assert len(graphs) != 1


def test_compiled_body_under_a_plain_head(dynamo):
    """Regional compilation: layers inside the compiled part are not watched."""
    x = images()
    model = convnet()
    model = nn.Sequential(torch.compile(model[:5], backend="eager"), model[5:]).eval()
    assert EnergyClassifier(model).probe_head(x).names == ("1.8",)


@pytest.mark.parametrize("warm", [False, True])
def test_compiled_head_under_a_plain_body(warm, dynamo):
    """Neither before nor after its first run is the compiled part hooked."""
    x = images()
    model = convnet()
    model = nn.Sequential(model[:5], torch.compile(model[5:], backend="eager")).eval()
    classifier = EnergyClassifier(model)
    if warm:
        truth(model, x)
    assert not classifier.probe_head(x).found
    assert "inside a compiled part" in classifier.head.message


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a compiler"
)
@pytest.mark.parametrize("make", [wrapped_compile, in_place_compile, compiled_forward])
def test_inductor(make, place, dynamo):
    """Real compiled code, whose last bits differ from the plain model's."""
    plain, x = convnet(), images()
    eager = truth(plain, x)
    model = make(convnet(), "inductor")
    expected = truth(model, x)
    assert torch.allclose(expected, eager, atol=1e-5)
    keeps_its_promises(model, x, expected, place, names=HEAD)
    assert torch.equal(truth(model, x), expected)


# --- wrappers of training


@pytest.mark.filterwarnings(TRAIN_MODE)
@pytest.mark.parametrize("training", [False, True])
def test_data_parallel(place, training):
    plain, x = convnet(), images()
    expected = truth(plain, x)
    keeps_its_promises(nn.DataParallel(plain).train(training), x, expected, place, names=HEAD)


def test_data_parallel_on_several_devices_is_watched_on_the_inner_model():
    """Replicas are copies: hooks on the original would see nothing."""
    model = nn.DataParallel(convnet()).eval()
    assert eager_run(model) is None
    model.device_ids = [0, 1]
    assert eager_run(model) == model.module._call_impl


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.filterwarnings(TRAIN_MODE)
@pytest.mark.parametrize("training", [False, True])
def test_distributed_data_parallel(place, process_group, training):
    plain, x = convnet(), images()
    expected = truth(plain, x)
    model = nn.parallel.DistributedDataParallel(plain).train(training)
    keeps_its_promises(model, x, expected, place, names=HEAD)


def test_wrappers_show_what_the_model_says(dynamo):
    plain = timm.create_model("test_resnet.r160_in1k", num_classes=CLASSES).eval()
    facts = EnergyClassifier(plain)
    assert facts.preprocessing.image_size == (160, 160)
    for model in (
        nn.DataParallel(plain),
        torch.compile(plain, backend="eager"),
        nn.DataParallel(torch.compile(plain, backend="eager")),
    ):
        assert unwrapped(model) is plain
        classifier = EnergyClassifier(model)
        assert classifier.name == facts.name == "test_resnet"
        assert classifier.preprocessing == facts.preprocessing
        assert classifier.weights_hash() == facts.weights_hash()
    bare = timm.create_model("test_resnet.r160_in1k", num_classes=0).eval()
    with pytest.raises(UnsupportedModelError, match="num_classes=0"):
        EnergyClassifier(nn.DataParallel(bare))


@pytest.mark.parametrize(
    "around",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: model.to(memory_format=torch.channels_last),
    ],
    ids=["DataParallel", "compile", "channels_last"],
)
def test_a_guard_of_the_plain_model_loads_on_the_wrapped_one(around, place, dynamo):
    plain, x = convnet(), images()
    with pytest.warns(EbmGuardWarning, match="no labels"):
        guard = ebm_guard.wrap(plain).fit(x, false_reject_rate=0.2, threshold="marginal")
    guard.save(place)
    first = guard(x)
    second = ebm_guard.Guard.load(place, around(convnet()).eval())(x)
    assert torch.equal(first.label, second.label)
    assert torch.allclose(first.score, second.score, atol=1e-5)
    with pytest.raises(ArtifactError, match="weights"):
        ebm_guard.Guard.load(place, around(convnet(seed=4)).eval())


# --- precision, layout, device


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float16, 1e-2), (torch.bfloat16, 3e-2), (torch.float64, 1e-10)],
)
def test_other_precisions(dtype, tolerance, place):
    model, x = convnet().to(dtype), images(dtype=dtype)
    expected = truth(model, x)
    assert expected.dtype == dtype
    guard = keeps_its_promises(model, x, expected, place, names=HEAD, tolerance=tolerance)
    assert guard.facts["dtype"] == str(dtype).removeprefix("torch.")
    assert guard(x).score.dtype == torch.float64


def test_autocast_around_a_call(place):
    """The logits are the model's own under autocast; what is made of them is not downcast."""
    model, x = convnet(), images()
    labels = truth(model, x).argmax(dim=1)
    labels[::4] = (labels[::4] + 1) % CLASSES
    guard = ebm_guard.wrap(model)
    guard.fit([(x, labels)], false_reject_rate=0.2, threshold="marginal")
    with torch.autocast("cpu", torch.bfloat16):
        expected = truth(model, x)
        head = guard.classifier.probe_head(x)
        decision = guard(x)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(decision.logits, expected)
    assert head.names == HEAD, head.message
    outside = guard.decide(expected)
    for name in ("status", "score", "energy", "confidence", "p_value"):
        assert torch.equal(getattr(decision, name), getattr(outside, name)), name
    # Not autocast's own rounding: bfloat16 keeps 8 bits.
    energy = -torch.logsumexp(expected.float(), dim=1)
    assert torch.allclose(decision.energy.float(), energy, atol=1e-6)


def test_channels_last(place):
    model = convnet().to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    guard = keeps_its_promises(model, x, truth(model, x), place, names=HEAD)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert guard.classifier.weights_hash() == weights_hash(convnet())


class Elsewhere(nn.Module):
    """A model on a device that this machine lacks: it notes where its inputs were put."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, device="meta"))
        self.eval()

    def forward(self, x):
        assert x.device.type == "meta"
        return torch.arange(4.0).reshape(2, 2)


def test_inputs_go_to_the_models_device():
    x = torch.zeros(2, 3)
    for model in (Elsewhere(), nn.DataParallel(Elsewhere()).eval()):
        classifier = EnergyClassifier(model)
        assert classifier.device == torch.device("meta")
        assert torch.equal(classifier(x), torch.arange(4.0).reshape(2, 2))
    assert x.device.type == "cpu"
    # A callable has no device to move to, and what is no tensor stays as it is.
    assert EnergyClassifier(lambda batch: batch).device is None


# --- what is known about the training loss


def test_known_tags_of_binary_cross_entropy():
    """How many of timm's published weights the known tags match: a fact about timm."""
    known = {"a1", "a2", "a3", "d", "d1", "d2"}
    names = timm.list_pretrained()
    matched = [name for name in names if name.partition(".")[2].partition("_")[0] in known]
    released = tuple(int(part) for part in timm.__version__.split(".")[:3] if part.isdigit())
    if released == (1, 0, 31):
        assert len(matched) == 35
    assert len(matched) >= 30
    assert {"resnet50.a1_in1k", "resnet152.a3_in1k", "convnext_pico.d1_in1k"} <= set(matched)
    assert not {"resnet50.tv_in1k", "resnet50.c1_in1k", "convnext_nano.d1h_in1k"} & set(matched)

    notes = {}
    for name in names:
        model = nn.Linear(4, CLASSES)
        architecture, _, tag = name.partition(".")
        model.pretrained_cfg = {"architecture": architecture, "tag": tag}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            notes[name] = EnergyClassifier(model).loss_note
        assert len(caught) == (name in matched), name
    assert sum("known BCE tag" in note for note in notes.values()) == len(matched)
    assert notes["resnet50.a1_in1k"].startswith("known BCE tag 'a1_in1k'")
    assert notes["resnet50.tv_in1k"] == "training loss unknown"


def test_loss_note_of_models_without_a_tag():
    assert EnergyClassifier(convnet()).loss_note == "training loss unknown"
    assert EnergyClassifier(lambda x: x).loss_note == "training loss unknown"
