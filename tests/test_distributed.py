"""Section 4.7: two processes compute what one does, with DDP and FSDP; checkpoints open everywhere.

`all_runs` goes on in the background while other tests run. One torchrun of this file makes all runs
of two processes: every process goes through `PLAN`.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import narrow, newest_checkpoint
from PIL import Image

import train
from data import COLOURS, UserError
from ldm import build_first_stage, load_model, save_model

FIRST = {
    "channels": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_levels": (),
    "z_channels": 4,
    "groups": 2,
    "codes": 16,
}
FIRST |= {
    "bottleneck": "vq",
    "equivariant": False,
    "beta": 0.25,
    "released": False,
    "kl_weight": 1e-6,
    "size": 16,
    "quantise_from": 0,
}
COMMON = "--model thesis --device cpu --precision float32 --updates 6 --validate-every 2"
COMMON += " --save-every 50 --preview-every 50 --seed 3 --batch 4 --lr 1e-3 --ema 0.998 --blocks 1"
LDM = f"--stage ldm {COMMON} --channels 32 --multipliers 1 1 --groups 2 --context-channels 16"
LDM = f"{LDM} --T 2 --warmup 3 --predict v".split()
LETTERS = f"--stage letters {COMMON} --channels 16 --multipliers 1 1 --overfit 27 --T 2".split()
LETTERS += ["--predict", "v"]
VQGAN = f"--stage vqgan {COMMON} --channels 8 --multipliers 1 2 --size 16 --codes 16 --groups 1"
VQGAN = f"{VQGAN} --perceptual 0 --quantise-from 2 --disc-start 3 --disc-channels 8".split()
VQGAN.append("--attention-levels")  # none

PLAN = {  # name: the stage and its flags
    "ddp": (*LDM, "--strategy", "ddp"),
    "fsdp": (*LDM, "--strategy", "fsdp"),
    "ddp-parts": (*LDM, "--strategy", "ddp", "--accumulate", 2),
    "fsdp-parts": (
        *(*LDM, "--strategy", "fsdp", "--accumulate", 2),
        *("--cpu-offload", "--checkpoint-activations"),
    ),
    "letters-ddp": LETTERS,
    "muon-ddp": (*LETTERS, "--optimizer", "muon"),
    "vqgan-ddp": VQGAN,
    "pyramid-ddp": (*LDM, "--pyramid", 32, "--strategy", "ddp", "--optimizer", "muon"),
}
SINGLE = {"single": LDM, "letters": LETTERS, "vqgan": VQGAN}
SINGLE |= {"muon": PLAN["muon-ddp"], "pyramid-muon": PLAN["pyramid-ddp"]}


def run_until(name, arguments, data, out, stop=None, resume=False):
    """A run in this process. Process 0 gets SIGTERM after update `stop`."""
    update, previews, draw = train.EMA.update, train.previews, train.images_by_label

    def interrupted(ema, n):
        update(ema, n)
        if n == stop and train.rank() == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    sets = () if resume or arguments[1] == "letters" else ("--data", data / "pictures")
    sets += ("--first-stage", data / "first.pt") if arguments[1] == "ldm" and not resume else ()
    train.EMA.update = interrupted
    if name != "fsdp":
        train.previews = lambda *_: {}  # pictures take longer than these runs
    train.images_by_label = narrow(draw)
    try:
        words = [*arguments, *sets, "--out", out / name, *(["--resume"] if resume else [])]
        train.train(*train.parse([str(word) for word in words]))
    except SystemExit as end:
        assert end.code == 128 + signal.SIGTERM and stop
    finally:
        train.EMA.update, train.previews, train.images_by_label = update, previews, draw
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)


def going_on(strategy=None):
    how = ("--strategy", strategy) if strategy else ()
    return ("--stage", "ldm", *how)


def with_plain_sgd(name, arguments, data, out):
    """SGD instead of AdamW, which enlarges differences where a gradient is near 0."""
    adamw = torch.optim.AdamW
    torch.optim.AdamW = lambda parameters, lr, **how: torch.optim.SGD(parameters, lr=lr)
    try:
        run_until(name, (*arguments, "--lr", 0.1), data, out)
    finally:
        torch.optim.AdamW = adamw


def all_runs(data, out):
    """Every run of one process, and a torchrun with every run of two processes."""
    make_pictures(data)
    for name, stage in SINGLE.items():
        run_until(name, stage, data, out)
    with_plain_sgd("sgd", LDM, data, out)
    for name in ("one-to-two", "one-to-ddp"):
        run_until(name, LDM, data, out, stop=4)
    done = torchrun(in_two_processes.__name__, data, out)
    assert done.returncode == 0, done.stderr[-3000:]
    run_until("two-to-one", going_on(), data, out, resume=True)


def make_pictures(folder):
    """Small pictures in folders named after the colours, and an untrained first stage."""
    g = np.random.default_rng(0)
    for i in range(24):
        place = folder / "pictures" / list(COLOURS)[i % 8]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.kron(g.integers(0, 256, (4, 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{i:02d}.png")
    torch.manual_seed(0)
    weights = build_first_stage(FIRST).state_dict()
    save_model(folder / "first.pt", "vqgan", FIRST, [], 1, {"ema": weights, "raw": weights})


def in_two_processes(data, out):
    """What each of the two processes does that `all_runs` starts."""
    for name, arguments in PLAN.items():
        run_until(name, arguments, data, out)
    for strategy in ("ddp", "fsdp"):
        with_plain_sgd(f"{strategy}-sgd", (*LDM, "--strategy", strategy), data, out)
    run_until("two-to-one", (*LDM, "--strategy", "fsdp"), data, out, stop=4)
    run_until("one-to-two", going_on("fsdp"), data, out, resume=True)
    run_until("one-to-ddp", going_on("ddp"), data, out, resume=True)
    if train.rank() == 0:
        shutil.copytree(out / "two-to-one", out / "fsdp-to-ddp")
    train.all_reduce(0.0)
    run_until("fsdp-to-ddp", going_on("ddp"), data, out, resume=True)
    settings = train.Latent(**newest_checkpoint(out / "fsdp")[0]["settings"])
    (out / f"shares-{train.rank()}.json").write_text(json.dumps(shares_of(settings, out / "fsdp")))


def shares_of(settings, run):
    """The share that this process keeps of the weights, gradients, moments and average of a run."""
    stage = train.LatentStage(settings)
    [player] = players = stage.players()
    train.parallel(players, settings)
    player.parameters = [p for p in player.network.parameters() if p.requires_grad]
    player.optimizer = torch.optim.AdamW(player.parameters, 1e-3, fused=True)
    ema = train.EMA(stage.model, 0.9)
    progress, tensors = train.newest_checkpoint(run)
    train.load_tensors(players, ema, stage, progress["names"], tensors)
    stage.start(resumed=True)
    player.loss(0, slice(train.rank(), None, train.world_size())).backward()
    gradients = [p.grad for p in player.parameters]
    player.optimizer.step()
    moments = [player.optimizer.state[p]["exp_avg_sq"] for p in player.parameters]
    sets = {
        "weights": player.parameters,
        "gradients": gradients,
        "moments": moments,
        "average": ema.average,
    }
    return {
        name: sum(x.to_local().numel() for x in tensors) / sum(x.numel() for x in tensors)
        for name, tensors in sets.items()
    }


def lose_a_process(data, out):
    """Process 1 is killed after three updates."""
    update = train.EMA.update

    def killed(ema, n):
        update(ema, n)
        if n == 3 and train.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    train.EMA.update = killed
    train.train(
        *train.parse([str(word) for word in (*LETTERS, "--save-every", 2, "--out", out / "lost")])
    )


# -------------------------------------------------------------------------------------------- tests


def torchrun(*arguments, file=__file__, **how):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        file,
        *arguments,
    ]
    command = [str(word) for word in command]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, **how)


def environment():
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def begin(folder):
    """Start `all_runs` in the background."""
    command = [sys.executable, __file__, all_runs.__name__, str(folder / "data"), str(folder)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(), start_new_session=True, **how)


@pytest.fixture(scope="module")
def runs(beside):
    """The folder of all runs, which conftest.py has begun."""
    process, folder = beside
    output, _ = process.communicate()
    assert process.returncode == 0, f"{all_runs.__name__}: {output[-3000:]}"
    return folder


def curve(run, *columns):
    rows = list(csv.DictReader((run / "log.csv").open()))
    assert [int(row["update"]) for row in rows] == [2, 4, 6]
    return np.array([[float(row[column] or "nan") for column in columns] for row in rows])


CURVES = ("train_loss", "train_grad_norm", "validation_loss", "validation_loss_ema")


@pytest.mark.parametrize("name", ["ddp", "ddp-parts"])
def test_e57_ddp_averages_gradients_before_the_step(runs, name):
    """Losses, gradient norms and validation are those of one process with the same images."""
    np.testing.assert_allclose(
        curve(runs / name, *CURVES), curve(runs / "single", *CURVES), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["fsdp", "fsdp-parts"])
def test_e59_fsdp_gathers_weights_and_scatters_gradients(runs, name):
    np.testing.assert_allclose(
        curve(runs / name, *CURVES), curve(runs / "single", *CURVES), rtol=1e-5
    )


def test_the_other_stages_in_two_processes(runs):
    np.testing.assert_allclose(
        curve(runs / "letters-ddp", *CURVES), curve(runs / "letters", *CURVES), rtol=1e-5
    )
    one, two = (
        curve(runs / name, "train_loss", "validation_loss") for name in ("vqgan", "vqgan-ddp")
    )
    np.testing.assert_allclose(two[:1], one[:1], rtol=1e-5)
    np.testing.assert_allclose(
        two, one, rtol=0.1
    )  # the adversary has joined: its norms are of a process's own images


def test_processes_that_share_the_products_of_muon_make_the_same_steps(runs):
    muon = curve(runs / "muon", *CURVES)
    np.testing.assert_allclose(curve(runs / "muon-ddp", *CURVES), muon, rtol=1e-4)
    assert (muon[1:] != curve(runs / "letters", *CURVES)[1:]).all()


def test_idle_u_nets_do_not_disturb_the_processes(runs):
    one, two = (curve(runs / name, *CURVES) for name in ("pyramid-muon", "pyramid-ddp"))
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_fsdp_refuses_a_pyramid(monkeypatch):
    """Every process validates with its own t, so with other U-Nets: they would wait for ever."""
    settings = train.Latent(pyramid=(32,), predict="v", strategy="fsdp")
    settings.complete()
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="--pyramid: .* need --strategy ddp"):
        settings.complete()


@pytest.mark.parametrize("name", ["ddp-sgd", "fsdp-sgd"])
def test_weights_with_plain_sgd_equal_those_of_one_process(runs, name):
    one, two = (newest_checkpoint(runs / run)[1] for run in ("sgd", name))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["two-to-one", "one-to-two", "one-to-ddp", "fsdp-to-ddp"])
def test_a_run_goes_on_with_other_processes_and_another_strategy(runs, name):
    assert {row["run"] for row in csv.DictReader((runs / name / "log.csv").open())} == {"1", "2"}
    np.testing.assert_allclose(
        curve(runs / name, *CURVES), curve(runs / "single", *CURVES), rtol=2e-5
    )


def test_e59_every_process_keeps_half_of_everything(runs):
    """Not layer 0 here and layer 1 there: a share of every weight and of all that belongs to it."""
    shares = [json.loads((runs / f"shares-{rank}.json").read_text()) for rank in range(2)]
    for kind in ("weights", "gradients", "moments", "average"):
        assert sum(share[kind] for share in shares) == pytest.approx(1)
        assert max(share[kind] for share in shares) < 0.51


def test_a_sharded_run_opens_in_one_process(runs):
    """model.pt holds whole tensors: its raw and averaged weights are those of the checkpoint."""
    progress, tensors = newest_checkpoint(runs / "fsdp")
    for weights, prefix in (("raw", "train."), ("ema", "ema.")):
        state = load_model(runs / "fsdp", weights).state_dict()
        of_run = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        assert len(of_run) > 50 and all(
            torch.equal(state[name], value) for name, value in of_run.items()
        )
    assert progress["update"] == 6


def test_a_lost_process_ends_the_run_with_one_line(tmp_path):
    done = torchrun(lose_a_process.__name__, tmp_path, tmp_path, timeout=100)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1, done.stderr
    assert (
        "another process is gone" in lines[0]
        and "--resume continues from the last checkpoint" in lines[0]
    )
    assert newest_checkpoint(tmp_path / "lost")[0]["update"] == 2


def test_torchrun_and_bad_input(tmp_path):
    """One line, from process 0, exit code 2; nothing is written."""
    words, message = (
        ("--batch", 5),
        "--batch 5: images per update; must be a multiple of 2 processes",
    )
    how = {"file": Path(train.__file__), "cwd": tmp_path}
    done = torchrun("--stage", "letters", *words, "--out", tmp_path / "run", **how)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(lines) == 1 and message in lines[0], done.stderr
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    what, data, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    program = partial(globals()[what], data, out)
    train.run_distributed(program) if "LOCAL_RANK" in os.environ else program()
