"""Every stage, sampler and metric on a GPU that is not there: no tensor is on the wrong device."""

import gpu as gpu_program
import pytest
import test_ldm
import torch
from conftest import make_tiny_model
from pretend import device, place
from test_ldm import ARGUMENTS, stir

import fid
import ldm
import sample
import train
from data import run_program
from vqgan import PerceptualLoss

folder, first_stage = test_ldm.folder, test_ldm.first_stage


@pytest.fixture(params=["cuda", "mps"])
def gpu(request, monkeypatch):
    with device(request.param, monkeypatch) as operations:
        yield operations


def test_the_net_catches_a_tensor_on_the_wrong_device(gpu):
    name = gpu.pretended
    x, w = torch.ones(2, 3, device=name), torch.nn.Linear(3, 4).to(name)
    assert x.device.type == name and w.weight.device.type == name
    y = w(x)
    assert y.device.type == name and (y + torch.tensor(1.0)).device.type == name
    y.square().mean().backward()
    assert w.weight.grad.device.type == name
    for wrong in (
        lambda: x + torch.ones(3),
        lambda: w(torch.ones(2, 3)),
        lambda: torch.cat([x, torch.ones(1, 3)]),
        lambda: torch.nn.functional.mse_loss(y, torch.zeros(2, 4)),
    ):
        with pytest.raises(RuntimeError, match="different devices"):
            wrong()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=name, generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    assert x.cpu().numpy().sum() == 6 and place(x.cpu()) == "cpu"
    gpu.waits.clear()
    x.sum().item()
    assert sum(gpu.waits.values()) == 1
    if name == "mps":
        with pytest.raises(TypeError, match="float64"):
            x.double()


LETTERS = "--stage letters --model small --channels 32 --multipliers 1 1 --T 4 --batch 4"
LETTERS += " --updates 2 --overfit 8 --validate-every 2 --preview-every 2 --save-every 1"


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--condition attention --predict eps",
        "--predict flow --views 2 --optimizer muon",
        "--precision float32 --accumulate 2 --balanced --ema 0",
    ],
)
def test_letters_train_on_it(gpu, tmp_path, more):
    words = [
        *LETTERS.split(),
        *more.split(),
        "--device",
        gpu.pretended,
        "--out",
        str(tmp_path / "run"),
    ]
    train.train(*train.parse(words))
    assert (tmp_path / "run" / "grid.png").exists()


FIRST = "--stage vqgan --model thesis --blocks 1 --attention-levels --channels 8 --multipliers 1 2"
FIRST += " --batch 4 --codes 8 --data letters --updates 3 --overfit 8 --validate-every 3"
FIRST += " --preview-every 3 --groups 2 --disc-channels 8 --quantise-from 1 --disc-start 1"


@pytest.mark.parametrize(
    "more",
    [
        "--bottleneck vq",
        "--bottleneck vq --adversarial 0 --precision float32 --save-every 1",
        "--bottleneck kl --equivariant --optimizer muon --views 8 --crop 16 --disc-layers 1",
        "--bottleneck none --adversarial-loss vanilla --no-adaptive --perceptual-files made",
    ],
)
def test_first_stages_train_on_it(gpu, tmp_path, monkeypatch, more):
    if "--perceptual-files" in more:
        monkeypatch.setattr(ldm, "load_perceptual", lambda files: stir(PerceptualLoss()))
    words = f"{FIRST} {more} --device {gpu.pretended} --out {tmp_path}/run".split()
    train.train(*train.parse(words))


@pytest.mark.parametrize(
    "more",
    [
        "--predict v --precision bf16",
        "--precision float32 --pyramid 32 --schedule log_linear --optimizer muon"
        " --checkpoint-activations",
        "--condition palette --views 8 --precision bf16",
    ],
)
def test_the_latent_model_trains_on_it(gpu, folder, first_stage, tmp_path, more):
    words = [*map(str, ARGUMENTS), "--data", str(folder), "--first-stage", str(first_stage)]
    words += [*more.split(), "--device", gpu.pretended]
    train.train(*train.parse([*words, "--updates", "2", "--out", str(tmp_path / "run")]))


CLASSIFIER = (
    "--stage classifier --overfit 8 --batch 4 --model small --channels 16 --multipliers 1 1"
)


def test_a_classifier_trains_on_it_and_guides(gpu, tiny_model, tmp_path):
    words = f"{CLASSIFIER} --run {tiny_model} --updates 2"
    words += f" --device {gpu.pretended} --out {tmp_path}/run"
    train.train(*train.parse(words.split()))
    model = sample.load(tiny_model, device=gpu.pretended)
    guide = sample.load_classifier(tmp_path / "run", model)
    for sampler in sample.SAMPLERS:
        how = {"sampler": sampler, "steps": 2, "classifier": guide, "scale": 3.0, "progress": False}
        assert sample.generate(model, ["A", "none"], **how).shape == (2, 32, 32, 3)


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
@pytest.mark.parametrize("bf16", [False, True])
def test_samplers_run_on_it(gpu, tiny_model, sampler, bf16):
    model = sample.load(tiny_model, device=gpu.pretended)
    model = model.compute_in_bf16() if bf16 else model
    for scale, clip, eta in ((2.0, True, 0.0), (1.0, False, 0.5), (0.0, None, 1.0)):
        how = {"sampler": sampler, "steps": 3, "scale": scale, "clip": clip}
        how |= {"eta": eta if sampler in ("ddim", "dpm") else 0.0, "progress": False}
        assert sample.generate(model, ["A"], count=2, **how).shape == (2, 32, 32, 3)


def test_bound_and_ode_run_on_it(gpu, run, tmp_path):
    model = make_tiny_model(tmp_path / "m.pt", T=3)
    for mode in ("--bound", "--ode"):
        how = ("--run", model, "--n", 2, "--device", gpu.pretended)
        code, _, err = run("sample", mode, *how)
        assert code == 0, err


def test_pictures_of_a_palette_model_and_its_first_stage_are_drawn_on_it(
    gpu, run, folder, first_stage, tmp_path
):
    out, where = tmp_path / "run", ["--device", gpu.pretended]
    more = ["--condition", "palette", "--data", folder, "--first-stage", first_stage]
    words = [*ARGUMENTS, *more, "--updates", 2, "--out", out, *where]
    train.train(*train.parse([str(word) for word in words]))
    for words in (
        ("--run", out, "--steps", 2, "--attention", "--colours", "gold", "navy", "--n", 2),
        ("--run", out, "--steps", 2, "--colours", "gold", "--away", "red", "--n", 2),
        ("--run", first_stage, "--reconstruct", folder),
        ("--prior", first_stage, "--n", 2),
    ):
        code, _, err = run("sample", *words, *where, "--out", tmp_path / "a.png")
        assert code == 0, err


def test_metrics_run_on_it(gpu):
    images = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    features = fid.letters_features(device=gpu.pretended)(images)
    assert place(features) == "cpu"
    inception = fid.inception_features(fid.Inception(), gpu.pretended)
    assert place(inception(images)) == "cpu"


def test_without_a_gpu_its_program_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        run_program(gpu_program.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and "no CUDA GPU here" in error and error.count("\n") == 1


@pytest.mark.parametrize("stage", ["letters", "vqgan", "ldm", "pyramid", "classifier"])
def test_an_update_does_not_wait_for_it(
    monkeypatch, folder, first_stage, tiny_model, tmp_path, stage
):
    """Six more updates, none of which is logged, add nothing that waits for the GPU."""
    monkeypatch.setattr(train, "previews", lambda *_: {})
    words = {
        "letters": LETTERS.split(),
        "vqgan": f"{FIRST} --bottleneck vq".split(),
        "ldm": ARGUMENTS,
        "pyramid": [*ARGUMENTS, "--pyramid", 32, "--condition", "palette", "--optimizer", "muon"],
        "classifier": f"{CLASSIFIER} --run {tiny_model}".split(),
    }[stage]
    words = [*map(str, words), "--device", "cuda", "--precision", "float32"]
    if stage in ("ldm", "pyramid"):
        words += ["--data", str(folder), "--first-stage", str(first_stage)]
    waits = []
    for updates in ("3", "9"):
        more = ["--updates", updates, "--out", str(tmp_path / updates), "--save-every", "99"]
        more += ["--validate-every", "99", "--preview-every", "99"]
        with device("cuda", monkeypatch) as operations:
            train.train(*train.parse(words + more))
        waits.append(operations.waits)
    assert waits[1] - waits[0] == {}
