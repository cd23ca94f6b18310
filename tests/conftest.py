"""Helpers: run a program in this process as a user would, a tiny untrained model on disk, golden
weights, files in the published form."""

import os
import signal
import sys
import types
import zlib

import numpy as np
import pytest
import torch

import data
import fid
import plots
import sample
import train
from ldm import build_letters, save_model

TINY = {"channels": 16, "multipliers": (1, 1), "blocks": 1, "schedule": "linear", "T": 1000}
TINY |= {"p_uncond": 0.2, "predict": "v", "data": "letters", "condition": "sum"}
data.tune("cpu")  # as the programs do, so that no result depends on the order of the tests
torch.set_num_threads(1)  # tiny networks do not need more
PROGRAMS = {"data": data.main, "fid": fid.main, "plots": plots.main}
PROGRAMS |= {"sample": sample.main, "train": train.main}


def reads_runs(test):
    return "runs" in getattr(test, "fixturenames", ())


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """The runs of test_distributed.py take longest: they go on beside the other tests."""
    import test_distributed

    if not any(map(reads_runs, request.session.items)):
        yield
        return
    folder = tmp_path_factory.mktemp("runs")
    process = test_distributed.begin(folder)
    yield process, folder
    if process.poll() is None:  # nobody waited for it
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def pytest_collection_modifyitems(items):
    """So their results are looked at last."""
    items.sort(key=reads_runs)


def narrow(draw):
    """One picture per label, in two steps: previews would take longer than the tiny runs."""
    return lambda model, columns, **how: draw(model, 1, **how | {"steps": 2})


@pytest.fixture(autouse=True)
def narrow_previews(monkeypatch):
    monkeypatch.setattr(train, "images_by_label", narrow(train.images_by_label))


@pytest.fixture(autouse=True)
def float32_is_faster(monkeypatch):
    """The default precision is the same on every machine, and nothing is timed."""
    monkeypatch.setattr(data, "convolution_seconds", lambda: (1.0, 2.0))


@pytest.fixture
def run(monkeypatch, capsys):
    """run("sample", "--label", "A", ...) -> (exit code, stdout, stderr)."""

    def call(program, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *map(str, arguments)])
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            data.run_program(PROGRAMS[program])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refused(run):
    """Run a program that must refuse its input: exit code 2, one line on stderr, returned."""

    def call(program, *arguments):
        code, _, err = run(program, *arguments)
        lines = [line for line in err.strip().splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
        return lines[0]

    return call


def newest_checkpoint(out):
    """Everything in the newest checkpoint of a run: its plain values, and all tensors by name."""
    content = torch.load(train.checkpoints(out)[0], weights_only=True)
    return content, content.pop("tensors")


def equal_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_tiny_model(path, **changes):
    settings = TINY | changes
    torch.manual_seed(0)
    model = build_letters(settings, data.ALPHABET)
    for p in model.parameters():  # nothing stays zero, so that every path matters
        p.data += 0.02 * torch.randn_like(p)
    save_model(
        path,
        "letters",
        settings,
        data.ALPHABET,
        0,
        {"ema": model.state_dict(), "raw": model.state_dict()},
    )
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("run") / "model.pt")


def standard_normal(name, shape):
    """The numbers that the golden outputs were made with: a function of the name alone."""
    return torch.from_numpy(
        np.asarray(np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)))
    )


def fill_(module, prefix):
    """Every parameter from its own name, as the golden outputs were made."""
    module.double()
    for name, p in module.named_parameters():
        z = standard_normal(prefix + name, p.shape)
        one = 0.05 * z + name.endswith("weight")  # scales of norms near 1, biases near 0
        p.data.copy_(z / np.sqrt(np.prod(p.shape[1:])) if p.ndim >= 2 else one)
    return module


class ModelCheckpoint:  # stands for Lightning's class of that name
    pass


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


def lightning_file(path, state, **more):
    """A state dict in a file like the published ones, with Lightning's names in it."""
    content = {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {
            ModelCheckpoint: {
                "monitor": "val/rec_loss",
                "best_model_score": np.float64(0.5),
                "current_score": None,
            }
        },
        "optimizer_states": [],
        **more,
    }
    names = [
        "pytorch_lightning",
        "pytorch_lightning.callbacks",
        "pytorch_lightning.callbacks.model_checkpoint",
    ]
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].ModelCheckpoint = ModelCheckpoint
    sys.modules.update(modules)
    try:
        torch.save(content, path)
    finally:
        for name in names:
            del sys.modules[name]
    return path
