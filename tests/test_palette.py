"""A palette instead of a label: tokens that attend (4.4.4, E52), and how true the colours are."""

import itertools

import numpy as np
import palettes as measures
import pytest
import test_ldm
import torch
from bench import Mixture
from conftest import equal_tensors
from PIL import Image
from scipy.stats import wasserstein_distance
from test_ldm import ARGUMENTS, COLOUR_NAMES, TINY, randn, stage, stir

import data
import fid
import ldm
import sample
import train
from data import UNKNOWN, UserError, lab_to_rgb, palette, read_colours, rgb_to_lab
from ddpm import classifier_free_guidance, guidance_away
from ldm import load_model
from unet import CrossAttention

folder, first_stage, undisturbed = test_ldm.folder, test_ldm.first_stage, test_ldm.undisturbed
LAB = {name: rgb_to_lab(np.array(rgb, np.float64)) for name, rgb in data.COLOURS.items()}


def painted(*parts, size=32):
    """Vertical stripes of (colour name, width in pixels)."""
    row = np.concatenate([[data.COLOURS[name]] * width for name, width in parts])
    return np.broadcast_to(row, (size, size, 3)).astype(np.uint8)


# ------------------------------------------------------------------------------------- colours


def test_lab_to_rgb_is_the_inverse_of_rgb_to_lab():
    rgb = np.random.default_rng(0).uniform(0, 255, (1000, 3))
    assert np.abs(lab_to_rgb(rgb_to_lab(rgb)) - rgb).max() < 1e-9
    for colour in ([0, 0, 0], [255, 255, 255], [3, 1, 2]):  # both branches of both curves
        assert np.abs(lab_to_rgb(rgb_to_lab(np.array(colour, float))) - colour).max() < 1e-9
    assert lab_to_rgb([50, 120, 0]).min() == 0  # not in sRGB


def test_a_palette_has_the_colours_of_a_picture_by_their_shares():
    found = palette(painted(("blue", 20), ("yellow", 8), ("red", 4)))
    for row, name, share in zip(found, ("blue", "yellow", "red"), (20, 8, 4)):
        assert np.abs(row[:3] - LAB[name]).max() < 25  # a thumbnail mixes colours at edges
        assert abs(row[3] - share / 32) < 0.1
    plain = palette(painted(("green", 32)))
    np.testing.assert_allclose(plain[0], [*LAB["green"], 1], atol=0.01)
    assert (plain[1:] == 0).all()


def test_a_palette_merges_near_colours_and_keeps_four():
    near = np.full((24, 24, 3), 100, np.uint8)
    near[:, :12] = 110  # Delta-E 4
    one = palette(near)
    assert (one[1:] == 0).all() and one[0, 3] == pytest.approx(1)
    expected = (rgb_to_lab(near[0, 0]) + rgb_to_lab(near[0, -1])) / 2
    np.testing.assert_allclose(one[0, :3], expected, atol=0.01)
    many = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    found = palette(many)
    assert found.shape == (4, 4) and found.dtype == np.float32
    assert found[:, 3].sum() == pytest.approx(1) and (np.diff(found[:, 3]) <= 0).all()
    assert np.array_equal(found, palette(many))


def test_palettes_of_a_packed_set_are_kept_and_made_again_with_its_images(tmp_path, monkeypatch):
    found = data.paint_set(tmp_path / "set", 32, 6)
    first = found.palettes()
    assert first.shape == (6, 4, 4)
    for image, row in zip(found.images, first):
        assert np.array_equal(row, palette(image))
    monkeypatch.setattr(data, "palette", lambda image: 1 / 0)
    assert np.array_equal(found.palettes(), first)
    (tmp_path / "set" / "images.npy").touch()
    with pytest.raises(ZeroDivisionError):
        found.palettes()


def test_colours_are_names_or_hexadecimal_with_or_without_a_share():
    found = read_colours(["gold", "#1E90ff:0.25", "white:.5"])
    gold, dodger = ([255, 215, 0], [0x1E, 0x90, 0xFF])
    np.testing.assert_allclose(found[0], [*rgb_to_lab(np.array(gold, float)), UNKNOWN], atol=1e-4)
    np.testing.assert_allclose(found[1], [*rgb_to_lab(np.array(dodger, float)), 0.25], atol=1e-4)
    assert found[2, 3] == 0.5 and (found[3] == 0).all()


@pytest.mark.parametrize(
    "words, message",
    [
        (["teel"], "'teel' is no colour; expected a name such as gold, or #rrggbb"),
        (["gold:0"], "gold:0: expected a share above 0 and at most 1"),
        (["gold:1.5"], "a share above 0"),
        (["gold:much"], "gold:much: expected a share"),
        (["gold:nan"], "a share above 0"),
        (["red:0.7", "blue:0.7"], "more than 1 together"),
        (["red"] * 5, "5 colours; expected 1 to 4"),
    ],
)
def test_wrong_colours_are_one_clear_line(words, message):
    with pytest.raises(UserError, match=message):
        read_colours(words)


# -------------------------------------------------------------------------------------- tokens


def tiny(**changes):
    torch.manual_seed(0)
    settings = TINY | {"condition": "palette"} | changes
    return stir(ldm.build_latent(settings, COLOUR_NAMES)).eval()


def palettes(*lists):
    """Words for colours -> (B, 4, 4)."""
    return torch.from_numpy(np.stack([read_colours(words) for words in lists]))


def test_a_token_depends_on_its_colour_alone_and_missing_ones_have_their_own():
    tokens = stir(ldm.PaletteTokens([(255, 0, 0)], 12))
    one, two = tokens(palettes(["gold", "navy:0.5"], ["white:0.1", "navy:0.5", "red"]))
    assert one.shape == (4, 12)
    torch.testing.assert_close(one[1], two[1])
    assert (one[0] - two[0]).abs().max() > 0.01
    assert torch.equal(one[2:], tokens.missing.expand(2, -1))
    known, unknown = tokens(palettes(["navy:1"], ["navy"]))[:, 0]
    assert (known - unknown).abs().max() > 0.01
    colour = tokens.palettes(torch.tensor([0, 1]))  # a label, then the zero-label
    torch.testing.assert_close(colour[0, 0, :3], torch.tensor(LAB["red"]).float())
    assert colour[0, 0, 3] == UNKNOWN and (colour[0, 1:] == 0).all() and (colour[1] == 0).all()


def test_the_order_of_tokens_does_not_matter():
    layer = stir(CrossAttention(32, 12, heads=2)).double()
    x, context = randn(3, 10, 32).double(), randn(3, 4, 12).double()
    for order in itertools.permutations(range(4)):
        other = layer(x, context[:, order])
        torch.testing.assert_close(other, layer(x, context), rtol=0, atol=1e-12)


def test_the_order_of_colours_does_not_matter_but_colours_and_shares_do():
    model, x, t = tiny(), randn(1, 4, 8, 8), torch.tensor([500])
    words = ["gold:0.5", "navy:0.2", "red"]

    def eps(words):
        return model.eps(x, t, palettes(words))

    same = eps(words)
    torch.testing.assert_close(eps(words[::-1]), same, rtol=1e-4, atol=1e-5)
    for other in (["gold:0.4", *words[1:]], ["gold", *words[1:]], words[:2], ["gold:0.5", "red"]):
        assert (eps(other) - same).abs().max() > 1e-3


def test_a_label_is_the_palette_of_its_colour_and_the_zero_label_has_none():
    model, x, t = tiny(), randn(2, 4, 8, 8), torch.tensor([3, 900])
    labels = torch.tensor([COLOUR_NAMES.index("blue"), model.zero_label])
    same = palettes(["blue"], ["blue"])
    same[1] = 0
    assert torch.equal(model.eps(x, t, labels), model.eps(x, t, same))
    assert torch.equal(model.zero_like(same), torch.zeros(2, 4, 4))
    assert model.zero_like(labels).tolist() == [8, 8]


def test_training_tells_one_to_four_colours_with_and_without_shares_or_nothing():
    p = torch.from_numpy(palette(painted(("blue", 14), ("yellow", 8), ("red", 6), ("white", 4))))
    u = torch.arange(1000) / 1000
    told = ldm.drop_colours(p.expand(1000, -1, -1), 0.2, u)
    counts = (told[..., 3] != 0).sum(1)
    assert torch.bincount(counts).tolist() == [200] * 5
    for n in range(1, 5):
        mine = told[counts == n, :n]
        assert torch.equal(mine[..., :3], p[:n, :3].expand(200, -1, -1))
        known = mine[..., 3] > 0
        assert known.all(1).sum() == (~known).all(1).sum() == 100
        assert torch.equal(mine[known.all(1), :, 3], p[:n, 3].expand(100, -1))
    assert (told[counts == 0] == 0).all()
    two = torch.from_numpy(palette(painted(("blue", 20), ("yellow", 12))))
    assert (ldm.drop_colours(two.expand(1000, -1, -1), 0.0, u)[:, 2:] == 0).all()
    assert (ldm.drop_colours(two[None], 1.0, torch.tensor([0.5])) == 0).all()


def test_b3_x_T_begins_at_the_mean_colour_of_the_palette():
    model, T = tiny(predict="v"), 1000
    model.mean[model.zero_label] = torch.tensor([1.0, 2, 3, 4])
    asked = palettes(["blue:0.75", "blue:0.25"], ["blue"], ["red"])
    asked = torch.cat([asked, torch.zeros_like(asked[:1])])
    noise = torch.zeros(4, *model.shape)
    start = model.start(asked, noise) / model.diffusion.alpha_bar[T].float().sqrt()
    blue = torch.tensor([-1.0, -1, 1])[None, :, None, None].expand(-1, -1, 8, 8)
    expected = model.encode(blue).mean((2, 3))[0]
    torch.testing.assert_close(start[0, :, 0, 0], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(start[0], start[1], rtol=1e-3, atol=1e-4)
    assert (start[2] - start[0]).abs().max() > 1e-3
    torch.testing.assert_close(start[3, :, 0, 0], model.mean[model.zero_label])


def test_away_from_a_label_is_the_score_of_its_negative_power():
    """eps' = -sqrt(1 - alpha_bar) d/dx [log p(x) + s log p(0 | x) - w log p(1 | x)]."""
    mixture, s, w = Mixture(), 2.0, 0.7
    for t in (30, 300, 900):
        x = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64, requires_grad=True)
        root = (1 - mixture.alpha_bar[t]).sqrt()
        log_f = mixture.log_f(x, t)
        gradient = torch.autograd.grad((s * log_f[:, 0] - w * log_f[:, 1]).sum(), x)[0]
        zero = mixture.eps(x, t).detach()
        means, variances = mixture.law(t)
        e_0, e_1 = (root * (x.detach() - m) / v for m, v in zip(means, variances))
        guided = guidance_away(classifier_free_guidance(zero, e_0, s), zero, e_1, w)
        torch.testing.assert_close(guided, zero - root * gradient)


def test_denoise_avoids_colours_and_labels_where_the_noise_is_strong():
    model, x, t = tiny(predict="v"), randn(2, 4, 8, 8), 900
    y, away = palettes(["blue"], ["red"]), palettes(["gold"], ["gold"])
    zero, e_y, e_away = (model.eps(x, t, p) for p in (model.zero_like(y), y, away))
    for scale, weight in ((1.0, 1.0), (2.0, 1.0), (5.0, 4.0)):
        eps = sample.with_cfg(model, y, scale, 1.0, away)
        expected = classifier_free_guidance(zero, e_y, scale) - weight * (e_away - zero)
        torch.testing.assert_close(eps(x, t), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(eps(x, 10), model.eps(x, 10, y), rtol=1e-3, atol=1e-4)
    how = {"seeds": [0, 1], "steps": 2, "guide_above": 0.0, "progress": False}
    plain = sample.generate(model, ["blue"], count=2, **how)
    other = sample.generate(model, ["blue"], count=2, away=COLOUR_NAMES.index("red"), **how)
    assert (plain != other).any()


# ----------------------------------------------------------------------------------- attention


def test_weights_of_attention_give_its_output():
    layer = stir(CrossAttention(32, 12, heads=2))
    x, context = randn(3, 10, 32), randn(3, 4, 12)
    weights = layer.weights(x, context)
    assert weights.shape == (3, 2, 10, 4)
    values = layer.split(layer.to_v(context))
    output = layer.to_out((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(output, layer(x, context))


def test_4_4_4_attention_finds_the_half_of_each_colour():
    """E52: latents of two halves, each of the latent of one colour. After training, a position
    reads the token of its own colour more than the other one, whatever the order of the tokens."""
    names, g = ["blue", "gold", "red", "white"], torch.Generator().manual_seed(0)
    model = tiny(predict="v", multipliers=(1,), attention_levels=(0,), size=8)
    asked, vectors = palettes(*[[name] for name in names])[:, :1], torch.eye(4) * 3 - 0.75
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, fused=True)

    def draw(n):
        pair = torch.rand((n, 4), generator=g).argsort(1)[:, :2]  # left and right
        z = vectors[pair].repeat_interleave(2, 1).transpose(1, 2)[:, :, None].expand(-1, -1, 4, -1)
        swap = torch.rand((n, 1), generator=g) < 0.5
        return z, asked[torch.where(swap, pair.flip(1), pair), 0], swap[:, 0]

    for _ in range(160):
        z, y, _ = draw(32)
        t = torch.randint(1, 1001, (32,), generator=g)
        loss = model.loss(z, y, t, torch.randn(z.shape, generator=g)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z, y, _ = draw(64)
    _, maps = sample.attention(model, y, range(64), scale=1.0, steps=10)
    assert maps.shape == (64, 4, 4, 4)
    torch.testing.assert_close(maps.sum(1), torch.ones(64, 4, 4))
    *_, (_, x, _) = sample.denoise(model, y, range(64), scale=1.0, steps=10)
    nearest = (x[:, None] - vectors[None, :, :, None, None]).square().sum(2).argmin(1)
    mine = asked[nearest, 0]  # (64, 4, 4, 4): the colour that a position has
    first = (mine[..., :3] - y[:, None, None, 0, :3]).abs().sum(-1) < 1
    second = (mine[..., :3] - y[:, None, None, 1, :3]).abs().sum(-1) < 1
    assert (first | second).double().mean() > 0.95
    right = torch.where(first, maps[:, 0] > maps[:, 1], maps[:, 1] > maps[:, 0])
    assert right[first | second].double().mean() > 0.9  # 0.5 by chance


# ------------------------------------------------------------------------------------ distance


def test_the_distance_of_palettes_is_an_optimal_transport():
    grey = [[L, 0, 0, share] for L, share in ((20, 0.5), (80, 0.5))]
    assert fid.palette_distance(grey, grey[::-1]) == pytest.approx(0, abs=1e-9)
    assert fid.palette_distance(grey, [[20, 0, 0, 1.0]]) == pytest.approx(30)  # half moves by 60
    assert fid.palette_distance([[0, 3, 4, 1.0]], [[0, 0, 0, 0.2]]) == pytest.approx(5)
    assert fid.palette_distance([[20, 0, 0, UNKNOWN], [80, 0, 0, UNKNOWN]], grey) < 1e-9
    padded = [*grey, [0, 0, 0, 0]]
    assert fid.palette_distance(padded, [[50, 0, 0, 1.0]]) == pytest.approx(30)
    g = np.random.default_rng(0)
    for _ in range(20):  # in one dimension: the area between the two distribution functions
        p, q = (
            np.column_stack([g.uniform(0, 100, n), np.zeros((n, 2)), g.dirichlet([1] * n)])
            for n in g.integers(1, 5, 2)
        )
        exact = wasserstein_distance(p[:, 0], q[:, 0], p[:, 3], q[:, 3])
        assert fid.palette_distance(p, q) == pytest.approx(exact)
        assert fid.palette_distance(q, p) == pytest.approx(exact)


# -------------------------------------------------------------------------------- the programs


@pytest.fixture(scope="module")
def trained(folder, first_stage, tmp_path_factory):
    """A run of two updates with palettes."""
    out = tmp_path_factory.mktemp("palette") / "run"
    more = ("--condition", "palette", "--data", folder, "--first-stage", first_stage)
    words = [str(word) for word in (*ARGUMENTS, *more, "--updates", 2, "--out", out)]
    train.train(*train.parse(words))
    return out


def test_training_tells_palettes_of_the_images(folder, first_stage):
    s = stage(folder, first_stage, condition="palette", p_uncond=0.0)
    found = s.data.palettes()
    _, y = s.examples(s.train_rows[:5])
    assert np.array_equal(y, found[s.train_rows[:5]])
    seen, s.model.loss = [], lambda x, y, t, noise: seen.append(y) or torch.zeros(len(y))
    for n in range(20):
        s.loss(n)
    told, whole = (
        torch.cat(seen),
        torch.from_numpy(np.concatenate([found[s.rows(n)] for n in range(20)])),
    )
    same = (told[..., :3] == whole[..., :3]).all(-1)
    assert (same | (told[..., 3] == 0)).all() and same[:, 0].all() and not same[:, 1:].all()


def test_a_run_with_palettes_draws_colours_labels_and_attention(run, refused, trained, tmp_path):
    out = tmp_path / "a.png"
    common = ("--run", trained, "--steps", 2, "--out", out)
    photo = tmp_path / "photo.png"
    Image.fromarray(painted(("blue", 20), ("yellow", 12))).save(photo)
    for words in (
        ("--colours", "#1e90ff", "gold:0.2", "--n", 2),
        ("--colours", "gold", "--away", "red", "white", "--n", 2),
        ("--colours", "gold", "--colours", "navy", "white", "--grid", "--n", 2),
        ("--like", photo, "--n", 2),
        ("--label", "blue", "--n", 2),
        ("--grid", "--n", 2),
        ("--colours", "gold", "--strip", "--n", 1),
    ):
        out.unlink(missing_ok=True)
        code, _, err = run("sample", *common, *words)
        assert code == 0 and out.exists(), err
    code, _, err = run("sample", *common, "--attention", "--colours", "gold", "navy", "--n", 3)
    assert code == 0, err
    picture = np.asarray(Image.open(out))
    assert picture.shape == (4 * 66 + 2, 3 * 66 + 2, 3)  # swatches above, then three images
    assert picture[30, 100].tolist() == [255, 215, 0]
    model = sample.load(str(trained))
    images = sample.generate(model, colours=["gold", "navy:0.3"], count=2, steps=2)
    again = sample.generate(model, palettes(["gold", "navy:0.3"]), count=2, steps=2)
    assert np.array_equal(images, again)
    for words, message in (
        (("--colours", "teel"), "'teel' is no colour"),
        (("--colours", *["red"] * 5), "5 colours; expected 1 to 4"),
        (("--colours", "red:2"), "red:2: expected a share"),
        (("--colours", "red", "--label", "blue"), "not with --label"),
        (("--colours", "red", "--like", photo), "not both"),
        (("--colours", "red", "--colours", "blue"), "several only with --grid"),
        (("--like", tmp_path / "none.png"), "none.png: No such file"),
        (("--attention",), "--attention: needs --colours, --like or --label"),
    ):
        assert message in refused("sample", *common, *words)


def test_the_measures_of_colours_run_on_a_palette_model(
    trained, undisturbed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(measures.HOW, "steps", 2)
    out = tmp_path / "path.png"
    monkeypatch.setattr("sys.argv", ["palettes.py", str(trained), str(out), "4"])
    measures.main()
    told = capsys.readouterr().out
    assert all(name in told for name in ("chance", "first stage", "scale 5: one colour"))
    assert Image.open(out).size == (9 * 130 + 2, 2 * 130 + 2)  # two paths of nine steps
    monkeypatch.setattr("sys.argv", ["palettes.py", str(undisturbed), str(out)])
    with pytest.raises(UserError, match="knows labels only"):
        measures.main()


def test_a_label_model_refuses_colours_but_avoids_a_label(run, refused, undisturbed, tmp_path):
    common = ("--run", undisturbed, "--steps", 2, "--out", tmp_path / "a.png", "--n", 1)
    assert "this model knows labels only" in refused("sample", *common, "--colours", "red")
    code, _, err = run("sample", *common, "--label", "blue", "--away", "red")
    assert code == 0, err
    assert "unknown label 'teel'" in refused("sample", *common, "--away", "teel")
    assert "avoids one label" in refused("sample", *common, "--away", "red", "blue")


def test_e52_the_picture_of_one_token_is_white(run, refused, undisturbed, tmp_path):
    out = tmp_path / "a.png"
    common = ("--steps", 2, "--out", out, "--n", 2, "--attention")
    code, _, err = run("sample", "--run", undisturbed, *common, "--label", "blue")
    assert code == 0, err
    picture = np.asarray(Image.open(out))
    assert picture.shape == (3 * 66 + 2, 2 * 66 + 2, 3)
    assert picture[30, 100].tolist() == [0, 0, 255] and (picture[70:130, 70:130] == 255).all()
    error = refused("sample", "--run", "letters", *common, "--label", "A")
    assert "this model has no cross-attention" in error


def test_init_from_a_label_model_keeps_the_network_and_begins_new_tokens(
    folder, first_stage, undisturbed, trained, capsys
):
    s = stage(folder, None, init=str(undisturbed), condition="palette")
    assert "the tokens of --condition palette are new" in capsys.readouterr().out
    assert equal_tensors(s.model.unet.state_dict(), load_model(undisturbed).unet.state_dict())
    assert isinstance(s.model, ldm.PaletteDiffusion)
    same = stage(folder, None, init=str(trained)).model  # as the model that it starts from
    assert equal_tensors(same.state_dict(), load_model(trained).state_dict())


def test_the_small_model_reads_palettes_and_the_thesis_s_a_label(folder, first_stage):
    for size, condition in {"small": "palette", "thesis": "label"}.items():
        assert stage(folder, first_stage, model=size).settings.condition == condition


def test_palettes_need_labels_that_are_colours(refused, first_stage, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "pets.npz", images=images, labels=np.array(["cat", "dog"] * 20))
    how = ("--condition", "palette", "--data", tmp_path / "pets.npz", "--out", tmp_path / "run")
    error = refused("train", *ARGUMENTS, *how, "--first-stage", first_stage, "--size", 16)
    assert "--condition palette: the labels of" in error
    s = stage(tmp_path / "pets.npz", first_stage, model="small", size=16)
    assert s.settings.condition == "label"
