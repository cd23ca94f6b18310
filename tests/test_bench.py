"""Section 4.7: what fits on a small GPU, as `bench.py plan` counts it; and its command line."""

import sys

import bench
import pytest

import data


def test_e58_what_a_process_holds():
    """395 M weights with gradients and moments take 6.3 GB; with average and first stage 8.2 GB.

    So a GPU of 11 GB holds the complete model, but few images (E58: "any of them can accommodate
    the complete model" means none of them). Offloading moves no gathered weights, no first stage.
    """
    sizes = 394_988_804, 31_000_000, 67_717_295
    one = bench.memory_per_process(*sizes, "ddp")
    held = 4 * (one["weights"] + one["gradients"] + one["moments"])
    assert held == 16 * sizes[0] == pytest.approx(6.3e9, rel=0.01)
    assert 4 * sum(one.values()) == pytest.approx(8.2e9, rel=0.01) and one["gathered"] == 0
    two, off = (bench.memory_per_process(*sizes, "fsdp", 2, offload) for offload in (False, True))
    assert all(
        two[kind] == one[kind] / 2 for kind in ("weights", "gradients", "moments", "average")
    )
    assert sum(off.values()) == two["gathered"] + sizes[2]


def test_every_image_keeps_as_many_activations():
    """Also with checkpointing, which keeps less than a third of them."""
    model = bench.latent_model(small=True)
    (one, few), (two, less), (three, least) = (bench.activation_bytes(model, n) for n in (1, 2, 3))
    assert three - two == pytest.approx(two - one, rel=1e-3)
    assert least - less == pytest.approx(less - few, rel=1e-3)
    assert 0 < less - few < (two - one) / 3


@pytest.mark.parametrize(
    "words", [["plan", "0"], ["plan", "nan"], ["unet", "--against", "diffusers"]]
)
def test_bad_input_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *words])
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        data.run_program(bench.main)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
