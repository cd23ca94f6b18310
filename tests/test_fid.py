"""Sections 4.4.7, 5.1, 5.3.1, 5.4 and 6.2: the metrics against closed forms and scipy, Inception
against published values, sets of every kind, and the command line."""

import hashlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import data
import fid
from data import ALPHABET, COLOURS, open_set, rgb_to_lab
from fid import (
    COLOUR_METRICS,
    Inception,
    colour_distances,
    frechet_distance,
    kernel_distance,
    letters_features,
    load_inception,
    mean_colour_distances,
    measure,
    offline_features,
    paintings_features,
    precision_recall,
    psnr,
    total_variation,
    variety,
)

GOLDEN = Path(__file__).parent / "golden"


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean, cov, n, seed=0):
    """n rows with exactly this sample mean and covariance; cov: (d, d) of full rank, n > d."""
    x = randn(n, len(mean), seed=seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.linalg.cholesky(cov).T + mean


# ------------------------------------------------------------------ reconstructions and variety


def test_psnr():
    x = torch.zeros(2, 3, 4, 4)
    found = psnr(x, x + torch.tensor([0.2, 2.0])[:, None, None, None])
    assert found.tolist() == pytest.approx([20.0, 10 * np.log10(4)])


def test_total_variation_is_of_neighbours_and_falls_with_blur():
    ramp = (torch.arange(8.0) / 8).expand(1, 3, 8, 8)
    assert total_variation(ramp).item() == pytest.approx(1 / 8)
    x = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert total_variation(torch.nn.functional.avg_pool2d(x, 3, 1, 1)) < 0.5 * total_variation(x)


def test_variety_is_the_mean_distance_of_two_images():
    images = np.zeros((2, 3, 4, 4, 3), np.uint8)
    images[1, 0] = 30
    assert variety(images).tolist() == pytest.approx([0, 20])


# ------------------------------------------------------------------ Frechet distance


def test_frechet_with_equal_covariances_is_the_distance_of_the_means():
    x, shift = randn(500, 30) @ randn(30, 30, seed=1), randn(30, seed=2)
    expected = pytest.approx(shift.square().sum().item(), rel=1e-9)
    assert frechet_distance(x, x + shift) == expected
    assert frechet_distance(x.numpy(), (x + shift).numpy()) == expected  # arrays, too


def test_frechet_with_commuting_covariances_is_a_sum_over_axes():
    """C1 C2 = C2 C1:  |m1 - m2|^2 + sum_i (sqrt(l_i) - sqrt(k_i))^2 over their common axes."""
    axes = torch.linalg.qr(randn(12, 12)).Q
    one, two = randn(12, seed=1).exp(), randn(12, seed=2).exp()
    m1, m2 = randn(12, seed=3), randn(12, seed=4)
    x = with_moments(m1, axes * one @ axes.T, 50, seed=5)
    y = with_moments(m2, axes * two @ axes.T, 50, seed=5)
    expected = (m1 - m2).square().sum() + (one.sqrt() - two.sqrt()).square().sum()
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(
    "m, n", [(400, 300), (20, 300), (300, 20), (20, 30), (2, 300), (41, 40), (3, 2)]
)
def test_frechet_equals_scipys_matrix_root_at_every_rank(m, n):
    """40 dimensions: both covariances regular, one singular, both singular."""
    x, y = randn(m, 40) @ randn(40, 40, seed=8) + 1, randn(n, 40, seed=1)
    C1, C2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm((C1 @ C2).astype(complex))
    means = (x.mean(0) - y.mean(0)).square().sum().item()
    expected = means + np.trace(C1) + np.trace(C2) - 2 * np.trace(root).real
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)  # symmetric


def test_frechet_scales_with_the_square_and_is_blind_to_rotation():
    x, y, turn = randn(90, 25), 2 * randn(80, 25, seed=1) + 1, torch.linalg.qr(randn(25, 25)).Q
    distance = frechet_distance(x, y)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * distance, rel=1e-9)
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(distance, rel=1e-9)
    with pytest.raises(ValueError, match="at least 2 images, not 1"):
        frechet_distance(x, y[:1])


def test_identical_sets_have_distance_0():
    """Also with dead features, equal features, equal images, and few images; far from 0, too."""
    full = randn(400, 60) * 10 ** torch.linspace(0, -5, 60, dtype=torch.float64)
    dead, double = full.clone(), full.clone()
    dead[:, 10:40], double[:, 30:] = 0, full[:, :30]
    few = (full[:61], full[:20], full[:20].repeat(2, 1), full[:2], full[:1].repeat(9, 1))
    for x in (full, full + 100, dead, double, *few):
        assert 0 <= frechet_distance(x, x.clone()) < 1e-6


def test_frechet_is_biased_upwards_and_unequal_counts_do_not_compare():
    """E61: two samples of one law. The distance falls with the number of images."""
    large = randn(2000, 64, seed=1)
    distances = [frechet_distance(randn(n, 64), large) for n in (30, 142, 1000)]
    assert distances[0] > 1.5 * distances[1] > 3 * distances[2] > 0
    assert torch.linalg.matrix_rank(torch.cov(randn(30, 64).T)) == 29


# ------------------------------------------------------------------ small sets


def test_kernel_distance_equals_its_definition():
    x, y = randn(7, 5), randn(9, 5, seed=1) + 0.5

    def mean(a, b, skip):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not skip or i != j]
        return np.mean([(a[i] @ b[j] / 5 + 1) ** 3 for i, j in pairs])

    def direct(x, y):
        return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)

    value, error = kernel_distance(x, y)
    assert value == pytest.approx(direct(x, y), rel=1e-10)
    without_x = [direct(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(7)]
    without_y = [direct(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(9)]
    assert error == pytest.approx(math.sqrt(6 * np.var(without_x) + 8 * np.var(without_y)))
    value, error = kernel_distance(x[:2], y)
    assert value == pytest.approx(direct(x[:2], y)) and math.isnan(error)
    assert all(math.isnan(number) for number in kernel_distance(x[:1], y))


def test_kernel_distance_is_unbiased_and_its_error_is_the_spread():
    """Over 300 draws of two laws a known distance apart, at few images.

    x ~ N(0, I), y ~ N(mu, I): with g = x . y the kernel is 1 + 3 g/d + 3 g^2/d^2 + g^3/d^3, and all
    means are known.
    """
    d, shift = 4, 0.7
    mu2 = d * shift**2  # |mu|^2

    def expected_kernel(u2, v2, uv):  # of u, v with means of those squared lengths and that product
        second = uv**2 + u2 + v2 + d
        third = uv**3 + 3 * uv * (u2 + v2 + d + 2)
        return 1 + 3 * uv / d + 3 * second / d**2 + third / d**3

    truth = expected_kernel(0, 0, 0) + expected_kernel(mu2, mu2, mu2)
    truth -= 2 * expected_kernel(0, mu2, 0)
    samples = [(randn(30, d, seed=2 * i), randn(40, d, seed=2 * i + 1)) for i in range(300)]
    values, errors = np.array([kernel_distance(x, y + shift) for x, y in samples]).T
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(len(values))
    assert errors.mean() == pytest.approx(values.std(), rel=0.2)
    same = np.array([kernel_distance(x[:10], y[:10])[0] for x, y in samples])
    assert abs(same.mean()) < 3 * same.std() / math.sqrt(len(same)) and (same < 0).any()


def test_precision_and_recall_where_the_answer_is_known():
    """Real images fill two places far apart; generated ones fill one, both, or another place."""
    here, there, nowhere = (0.1 * randn(50, 8, seed=i) + 100 * i for i in range(3))
    real = torch.cat([here, there])
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, here) == (1, 0.5)  # modes dropped: precise, half is missing
    assert precision_recall(here, real) == (0.5, 1)
    mixed = torch.cat([here, there, nowhere, nowhere])
    assert precision_recall(real, mixed) == (0.5, 1)  # half is unlike anything real
    assert precision_recall(here, nowhere) == (0, 0)
    assert all(math.isnan(share) for share in precision_recall(real, here[:3]))
    collapsed = here[:1].repeat(50, 1)
    assert precision_recall(collapsed, collapsed) == (1, 1)  # balls of radius 0 contain the centre


def test_large_sets_are_computed_in_chunks_and_sampled_evenly(monkeypatch):
    x, y = randn(130, 3), randn(70, 3, seed=1) * 0.7
    brute = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, 3]
    inside = torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist") <= brute
    shares, value = precision_recall(x, y), kernel_distance(x, y)
    assert shares[0] == inside.any(1).double().mean().item()
    monkeypatch.setattr(fid, "CHUNK", 13)
    x, y = x.clone(), y.clone()  # nothing is remembered of new tensors
    assert precision_recall(x, y) == shares and kernel_distance(x, y) == pytest.approx(value)
    monkeypatch.setattr(fid, "MOST", 44)
    few = x.clone()[::3]  # rows 0, 3, ... 129
    assert kernel_distance(x.clone(), y[:40]) == pytest.approx(kernel_distance(few, y[:40]))
    assert precision_recall(x.clone(), y[:40]) == precision_recall(few, y[:40])


# ------------------------------------------------------------------ Inception


def fill(name, shape):
    """The rule of the golden values: numbers that depend on the name only (gain sqrt(2))."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(z)
    if z.ndim >= 2:
        return math.sqrt(2) * z / math.sqrt(np.prod(shape[1:]))
    return 1 + 0.05 * z if name.endswith("weight") else 0.05 * z


@pytest.fixture(scope="module")
def inception():
    network = Inception().double().eval()
    for name, value in network.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            value.copy_(torch.from_numpy(np.asarray(fill(name, value.shape))))
    return network


@pytest.fixture(scope="module")
def inception_weights(inception, tmp_path_factory):
    """A weight file as published: (path, sha256). Old files lack the counters of the norms."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    state = inception.state_dict()
    torch.save({k: v.float() for k, v in state.items() if "num_batches" not in k}, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_inception_has_the_names_and_shapes_of_the_published_file(inception):
    layout = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for line in (GOLDEN / "inception_layout.txt").read_text().splitlines():
        name, *shape = line.split()
        layout[f"{name}.conv.weight"] = tuple(map(int, shape))
        for part in ("weight", "bias", "running_mean", "running_var"):
            layout[f"{name}.bn.{part}"] = (int(shape[0]),)
        layout[f"{name}.bn.num_batches_tracked"] = ()
    assert {name: tuple(value.shape) for name, value in inception.state_dict().items()} == layout
    assert len(layout) == 566 and sum(p.numel() for p in inception.parameters()) == 23_850_960


def test_inception_features_equal_the_published_tools(inception):
    """In float64, every 32nd of the 2048 features of two images of 32 x 32. Pools, paddings and the
    resize must all be FID's for this."""
    images = np.random.RandomState(zlib.crc32(b"input:fid.a")).random_sample((2, 3, 32, 32))
    with torch.no_grad():
        found = inception(torch.from_numpy(images))
    expected = np.loadtxt(GOLDEN / "inception_features.txt").T
    assert found.shape == (2, 2048) and np.abs(found[:, ::32].numpy() - expected).max() < 1e-9


def test_inception_weights_are_checked(inception_weights):
    path, sha256 = inception_weights
    network = load_inception(path, sha256)
    assert not network.training
    assert torch.equal(network.fc.bias, torch.from_numpy(fill("fc.bias", (1008,))).float())
    with pytest.raises(data.UserError, match=f"not Inception's .* weights \\(sha256 {sha256[:8]}"):
        load_inception(path)


def test_inception_stays_in_float32(inception_weights):
    features = fid.inception_features(load_inception(*inception_weights))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8, generator=generator)
    plain = features(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(images), plain) and plain.dtype == torch.float32


# ------------------------------------------------------------------ features without a download


def test_paintings_features_see_colour_and_scale_and_nothing_else():
    stripes = {w: np.indices((64, 64))[1] // w % 2 * 200 + 20 for w in (1, 4, 16)}
    images = {f"stripes {w}": np.repeat(grey[..., None], 3, 2) for w, grey in stripes.items()}
    images |= {name: np.full((64, 64, 3), COLOURS[name]) for name in ("red", "blue")}
    images["mirrored"] = images["stripes 4"][:, ::-1]
    images["turned"] = images["stripes 4"].transpose(1, 0, 2)
    x = paintings_features(torch.from_numpy(np.stack(list(images.values())).astype(np.uint8)))
    f = dict(zip(images, x))
    assert x.shape == (7, 130) and x.dtype == torch.float32 and x.isfinite().all()
    assert (f["mirrored"] - f["stripes 4"]).norm() < 1e-3
    assert (f["turned"] - f["stripes 4"]).norm() > 1
    no_box_in_common = 8 * math.sqrt(2)  # the largest distance
    assert (f["red"] - f["blue"])[:100].norm() == pytest.approx(no_box_in_common)
    assert torch.equal(f["red"][100:], f["blue"][100:])  # both plain: no differences at any scale
    torch.testing.assert_close(f["red"][100:], torch.full((30,), 0.8 * (math.log(0.1) - 2)))
    half = f["stripes 16"][:100].sort().values[-2:]
    assert half.tolist() == pytest.approx([8 * math.sqrt(0.5)] * 2)
    across = {w: f[f"stripes {w}"][100:].view(5, 2, 3)[:, 1, 0] for w in (1, 16)}  # L, by scale
    assert across[1][0] > across[16][0] and across[1][4] < across[16][4]


def test_letters_features_tell_letters_apart():
    """The features follow the letter and not the font, for fonts that the classifier never saw."""
    letters = open_set("letters:validation")
    features = letters_features()(torch.from_numpy(letters.images).expand(-1, -1, -1, 3))
    assert features.shape == (1040, 64) and not features.requires_grad
    nearest = (torch.cdist(features, features) + torch.eye(1040) * 1e9).argmin(1)
    assert (letters.labels[nearest] == letters.labels).mean() > 0.9


def test_a_letters_classifier_can_be_trained_and_used(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(data.ASSETS))
    import make_letters_classifier as script

    letters = open_set("letters")
    rows = slice(0, 26 * 20)
    few = data.ImageSet(letters.images[rows], letters.labels[rows], letters.sources[rows], ALPHABET)
    monkeypatch.setattr(script, "open_set", lambda name: few)
    accuracy = script.train_letters_classifier(tmp_path / "own.pt", epochs=3, batch=26)
    assert accuracy > 0.4
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    assert letters_features(tmp_path / "own.pt")(images).shape == (2, 64)


def test_features_for_letters_are_taken_for_capital_letters_only():
    """A4: numbers are not letters, and neither is one class alone."""
    assert offline_features(list("ABC")) == offline_features(ALPHABET) == "letters"
    for classes in (["0", "1"], ["A"], ["a", "b"], ["A", "10"], ["all"], list(COLOURS)):
        assert offline_features(classes) == "paintings"


# ------------------------------------------------------------------ colour


def test_lab_anchors_give_the_distances_of_both_spaces():
    """E64: black to white is 441.7 in RGB and 100 in LAB, so lower numbers in LAB mean nothing."""
    white = np.full((4, 4, 3), 255, np.uint8)
    found = dict(zip(COLOUR_METRICS, colour_distances(white, "black")))
    assert found["pixels_rgb"] == found["mean_rgb"] == pytest.approx(math.sqrt(3) * 255)
    assert found["pixels_lab"] == pytest.approx(100, abs=1e-3)
    assert found["nearest_rgb"] == found["nearest_lab"] == 0
    assert colour_distances(white, "white") == pytest.approx([0, 0, 1, 0, 0, 1], abs=1e-3)
    for name, lab in (("red", (53.24, 80.09, 67.20)), ("blue", (32.30, 79.19, -107.86))):
        np.testing.assert_allclose(rgb_to_lab(np.array(COLOURS[name])), lab, atol=0.02)


def test_e63_two_metrics_that_the_captions_do_not_tell_apart():
    """Half red, half yellow under the label orange: the mean is near, the pixels are far."""
    image = np.zeros((10, 10, 3), np.uint8)
    image[:5], image[5:] = COLOURS["red"], COLOURS["yellow"]
    found = dict(zip(COLOUR_METRICS, colour_distances(image, "orange")))
    assert found["pixels_rgb"] == pytest.approx((165 + 90) / 2)
    assert found["mean_rgb"] == pytest.approx(165 - 127.5) and found["nearest_rgb"] == 1


@pytest.mark.parametrize("label", COLOURS)
def test_the_mean_colour_is_never_farther_than_the_pixels(label):
    images = np.random.default_rng(0).integers(0, 256, (20, 6, 6, 3), np.uint8)
    images[10:] //= np.arange(1, 11, dtype=np.uint8)[:, None, None, None]
    for image in images:
        found = dict(zip(COLOUR_METRICS, colour_distances(image, label)))
        for space in ("rgb", "lab"):
            assert found[f"mean_{space}"] <= found[f"pixels_{space}"] + 1e-9


def test_figure_5_7_colour_distance_is_that_of_the_evaluation():
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 8, 8, 3), np.uint8)
    rows = zip(list(COLOURS), images)
    expected = [np.mean([colour_distances(x, name)[1] for x in row]) for name, row in rows]
    np.testing.assert_allclose(mean_colour_distances(images, list(COLOURS)), expected)
    assert mean_colour_distances(images, ["A", "B"]) is None


# ------------------------------------------------------------------ sets


def write_set(root, labels=("yellow", "red"), count=6, size=(32, 32), seed=0, noise=60):
    """Images of the label's colour with noise, one folder per label; label "" is flat in `root`."""
    random = np.random.default_rng(seed)
    for label in labels:
        (root / label).mkdir(parents=True)
        for i in range(count):
            colour = np.array(COLOURS.get(label.lower(), (99, 99, 99)))
            image = np.clip(colour + random.normal(0, noise, (*size[::-1], 3)), 0, 255)
            Image.fromarray(image.astype(np.uint8)).save(root / label / f"{i}.png")
    return root


def colour_features(images):
    return images.float().flatten(1, 2).mean(1) / 255


def measured(path, size=32, **how):
    return measure("set", open_set(path, pack=False), colour_features, size, **how)


def test_every_kind_of_set_gives_the_same_numbers_in_the_order_of_table_4_1(tmp_path):
    """A folder, the same folder packed, and .npz files, in batches of any size."""
    root = write_set(tmp_path / "set", ("Yellow", "black", "Orange"), 5)
    packed = open_set(root, 32)
    names = np.array(packed.classes)[packed.labels]
    np.savez(tmp_path / "names.npz", images=packed.images, labels=names)
    expected = measured(root)
    assert list(expected) == ["orange", "yellow", "black", "all"] and len(expected["all"][0]) == 15
    for name in ("orange", "yellow", "black"):
        x, colours = expected[name]
        assert x.shape == (5, 3) and x.dtype == torch.float32 and colours.shape == (5, 6)
        assert x.mean(0).sub(torch.tensor(COLOURS[name]) / 255).abs().max() < 0.2
        assert colours[:, list(COLOUR_METRICS).index("nearest_rgb")].all()
    for path in (tmp_path / "set.packed32", tmp_path / "names.npz"):
        for label, (x, colours) in measured(path, batch=2).items():
            torch.testing.assert_close(x, expected[label][0])
            np.testing.assert_allclose(colours, expected[label][1])


def test_b2_a_jpeg_has_the_same_pixels_packed_and_in_its_folder(tmp_path):
    """B2: large JPEGs are decoded at a reduced size, everywhere or nowhere."""
    random = np.random.default_rng(0)
    for label in ("A", "B"):
        (tmp_path / "set" / label).mkdir(parents=True)
        small = random.integers(0, 256, (40, 56, 3), np.uint8)
        image = Image.fromarray(small).resize((560, 400), Image.Resampling.BICUBIC)
        image.save(tmp_path / "set" / label / "0.jpg", quality=90)

    def pixels(images):
        return images.flatten(1).float()

    folder = measure("folder", open_set(tmp_path / "set", pack=False), pixels, 32)
    packed = measure("packed", open_set(tmp_path / "set", 32), pixels, 32)
    assert torch.equal(folder["all"][0], packed["all"][0]) and folder["all"][0].std() > 30


def test_any_labels_are_labels_and_flat_sets_have_none(tmp_path):
    """A4: the numbers of an .npz are no letters."""
    images = np.zeros((4, 9, 7), np.uint8)
    np.savez(tmp_path / "digits.npz", images=images, labels=np.array([2, 0, 2, 2]))
    np.savez(tmp_path / "flat.npz", images=images)
    write_set(tmp_path / "flat", [""])
    counts = {"digits.npz": {"0": 1, "2": 3, "all": 4}, "flat.npz": {"all": 4}, "flat": {"all": 6}}
    for name, expected in counts.items():
        assert {label: len(x) for label, (x, _) in measured(tmp_path / name).items()} == expected
    found = measured("letters:validation")
    assert {label: len(x) for label, (x, _) in found.items()} == dict.fromkeys(ALPHABET, 40) | {
        "all": 1040
    }


def test_every_size_and_mode_goes_through_one_anti_aliased_resize(tmp_path):
    """Large, small, wide, grey and transparent images in one folder; thin lines turn grey."""
    root = tmp_path / "set"
    root.mkdir()
    lines = np.zeros((256, 256), np.uint8)
    lines[:, ::2] = 255
    Image.fromarray(lines).save(root / "0.png")
    Image.fromarray(np.repeat(lines, 2, 1)).convert("RGBA").save(root / "1.png")
    Image.fromarray(lines[:16, :16]).convert("P").save(root / "2.png")
    pixels = measure("set", open_set(root, pack=False), lambda images: images.flatten(1), 64)
    x, colours = pixels["all"]
    images = x.view(3, 64, 64, 3)
    assert np.isnan(colours).all()
    assert (images[0, :, 4:-4] - 127).abs().max() < 20


# ------------------------------------------------------------------ command line


@pytest.fixture
def no_inception(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def results(out):
    return json.loads((out / "evaluation.json").read_text())


def test_command_line_per_label(run, no_inception, tmp_path):
    """Figures 5.5 to 5.7 of a good set, one with the two labels exchanged, and the real set."""
    real, out = write_set(tmp_path / "real", count=40), tmp_path / "out"
    good = write_set(tmp_path / "good", count=40, seed=1)
    (tmp_path / "bad").mkdir()
    for a, b in (("red", "yellow"), ("yellow", "red")):
        (tmp_path / "bad" / a).symlink_to(good / b)
    fakes = (f"ldm={good}", f"gan={tmp_path / 'bad'}", f"copy={real}")
    arguments = ("--real", real, "--per-label", "--size", 32, "--out", out, "--fake", *fakes)
    code, text, err = run("fid", *arguments)
    assert code == 0 and "no FID" in err and "FID" not in text
    assert "LAB histogram" in text and "Lanczos to 32 x 32" in text
    assert "compare only rows with equal counts" in text  # 40 images, 130 features
    found = results(out)
    own = {(row["label"], row["set"]): row for row in found["own"]}
    assert list(own)[:3] == [("yellow", "ldm"), ("yellow", "gan"), ("yellow", "copy")]
    for label in ("yellow", "red"):
        ldm, gan, copy = (own[label, name] for name in ("ldm", "gan", "copy"))
        assert (ldm["images"], ldm["real"]) == (40, 40) and ldm["marks"] == "*~?"
        assert gan["frechet"] > 5 * ldm["frechet"] > 0 and abs(copy["frechet"]) < 1e-6
        assert gan["kernel"] > 10 * abs(ldm["kernel"]) and gan["kernel"] > 5 * gan["kernel_error"]
        assert ldm["precision"] > 0.5 and gan["precision"] == 0
        assert copy["precision"] == copy["recall"] == 1
    every = {(row["label"], row["set"]): row for row in found["all"]}
    same = every["all", "ldm"]["frechet"]  # the same images, wrong labels
    assert every["all", "gan"]["frechet"] == pytest.approx(same)
    assert every["red", "ldm"]["real"] == 80 and every["red", "ldm"]["precision"] > 0.5
    assert every["red", "ldm"]["frechet"] > own["red", "ldm"]["frechet"]
    colour = {(row["label"], row["set"]): row for row in found["colour"]}
    assert {name for _, name in colour} == {"real", "ldm", "gan", "copy"}
    assert colour["red", "real"]["nearest_rgb"] == 1 and colour["red", "gan"]["nearest_lab"] == 0
    assert colour["all", "gan"]["mean_rgb"] > 3 * colour["all", "real"]["mean_rgb"]
    assert all(row["mean_lab"] <= row["pixels_lab"] for row in found["colour"])
    for name in ("figure_5_5", "kernel_distance", "figure_5_6", "figure_5_7"):
        assert Image.open(out / f"{name}.png").width >= 900


def test_damaged_images_are_left_out_counted_and_named(run, refused, no_inception, tmp_path):
    """A16: one damaged image stops nothing. Two images per label are enough for a distance."""
    real, fake = write_set(tmp_path / "real", count=2), write_set(tmp_path / "fake", count=3)
    png = (fake / "red" / "1.png").read_bytes()
    (fake / "red" / "1.png").write_bytes(png[: len(png) // 2])
    (fake / "yellow" / "0.png").write_text("not an image")
    out = tmp_path / "out"
    arguments = ("--real", real, "--fake", fake, "--per-label", "--size", 32, "--out", out)
    code, _, err = run("fid", *arguments)
    assert code == 0 and "2 of 6 left out: 1.png (damaged" in err and "0.png (not an image" in err
    row = results(out)["own"][0]
    assert row["images"] == row["real"] == 2 and np.isfinite(row["kernel"])
    assert row["kernel_error"] is None and row["precision"] is None
    (fake / "red" / "2.png").write_text("not an image")
    assert "1 image with label red" in refused("fid", *arguments)


def test_command_line_says_fid_of_inception_only(run, inception_weights, tmp_path, monkeypatch):
    path, sha256 = inception_weights
    monkeypatch.setattr(fid.load_inception, "__defaults__", (sha256,))
    real, out = write_set(tmp_path / "real", [""], 3), tmp_path / "out"
    arguments = ("--real", real, "--fake", f"same={real}", "--size", 32, "--inception", path)
    code, text, _ = run("fid", *arguments, "--out", out)
    assert code == 0 and "FID" in text and "KID" in text
    assert "Inception's pool features (2048)" in text and "to 32 x 32" in text
    row = results(out)["all"][0]
    assert row["frechet"] < 1e-6 and row["precision"] is None  # 3 images: no third neighbour
    assert not (out / "figure_5_6.png").exists()  # no colour labels


def test_colours_only(run, tmp_path):
    real, out = write_set(tmp_path / "real", count=2, size=(90, 64)), tmp_path / "out"
    fake = write_set(tmp_path / "fake", count=3, size=(16, 16))
    arguments = ("--real", real, "--fake", fake, "--features", "none", "--size", 32, "--out", out)
    code, text, _ = run("fid", *arguments)
    assert code == 0 and "distance to the label colour" in text
    assert not (out / "figure_5_5.png").exists() and (out / "figure_5_7.png").exists()


@pytest.fixture
def bad(tmp_path):
    """name -> (real, fake, more arguments, words of the message)"""
    good = write_set(tmp_path / "good", count=3)
    (tmp_path / "empty").mkdir()
    one, flat = write_set(tmp_path / "one", [""], 1), write_set(tmp_path / "flat", [""], 3)
    other = write_set(tmp_path / "other", ["yellow", "blue"], 3)
    (tmp_path / "wrong.pth").write_text("not the weights")
    weights = ("--features", "inception", "--inception", tmp_path / "wrong.pth")
    letters = ("--features", "letters")
    return {
        "empty folder": (good, tmp_path / "empty", (), "no images in it"),
        "no folder": (tmp_path / "nothing", good, (), "no such file or folder"),
        "one image": (good, one, (), "1 image with label all; at least 2 are needed"),
        "labels on one side": (good, other, ("--per-label",), "good has yellow, red;"),
        "no labels": (good, flat, ("--per-label",), "the same class folders"),
        "no labels at all": (flat, flat, ("--per-label",), "the same class folders"),
        "text as a set": (good, tmp_path / "wrong.pth", (), "not an .npz file"),
        "wrong weights": (good, good, weights, "not Inception's"),
        "weights missing": (good, good, (*weights[:3], tmp_path / "nothing"), "No such file"),
        "no weights": (good, good, ("--features", "inception"), "use --download"),
        "wrong classifier": (good, good, (*letters, "--classifier", good), "not a letters class"),
        "letters at another size": (good, good, (*letters, "--size", 64), "letters need 32"),
        "small paintings": (good, good, ("--size", 16), "--size 32 or more"),
        "same name twice": (good, good, ("--fake", good, f"good={flat}"), "'good' is taken"),
        "no device": (good, good, ("--device", "cuda:99"), "not there on this machine"),
        "no batch": (good, good, ("--batch", 0), "--batch must be 1 or more"),
        "file in the way": (good, good, ("--out", tmp_path / "wrong.pth"), "file of that name"),
    }


def test_bad_input_is_one_clear_line_and_nothing_is_lost(refused, no_inception, bad, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text("the last evaluation")
    for name, (real, fake, more, words) in bad.items():
        arguments = ("--out", tmp_path / "out", "--size", 32, "--real", real, "--fake", fake, *more)
        message = refused("fid", *arguments)
        assert words in message, (name, message)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["evaluation.json"]
    assert (tmp_path / "out" / "evaluation.json").read_text() == "the last evaluation"


def test_downloads_are_checked(monkeypatch, no_inception, refused, tmp_path):
    """Without a network: the address, the expected hash, and one clear line if it fails."""

    def no_network(url, path, hash_prefix):
        assert url.endswith("pt_inception-2015-12-05-6726825d.pth")
        assert hash_prefix == fid.INCEPTION_SHA256
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    real = write_set(tmp_path / "real", [""], 2)
    message = refused("fid", "--real", real, "--fake", f"same={real}", "--download")
    assert "cannot fetch" in message and "(no network)" in message


# ----------------------------------------------------- faults that were found by trying the product


def test_inception_is_given_values_from_0_to_1():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.flatten(1)

    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 3, 1).expand(1, 1, 3, 3)
    fid.inception_features(Spy())(image)
    assert seen[0][0, 0, 0].tolist() == pytest.approx([0, 0.2, 1])


def test_total_variation_counts_both_directions_alike():
    ramp = (torch.arange(8.0) / 8).expand(1, 3, 8, 8)
    assert total_variation(ramp.transpose(2, 3)).item() == pytest.approx(1 / 8)
    assert total_variation(ramp + ramp.transpose(2, 3) - 1).item() == pytest.approx(2 / 8)


def test_the_marks_say_what_cannot_be_compared():
    """* as many images as features or fewer; ? fewer than 100; ! counts that differ (B13)."""
    x = randn(2000, 8)
    assert "*" in fid.compare(x[:8], x[8:16])["marks"]
    assert "*" not in fid.compare(x[:9], x[9:18])["marks"]
    assert "?" in fid.compare(x[:99], x[99:198])["marks"]
    assert not {"?", "!"} & {*fid.compare(x[:100], x[100:300])["marks"]}
    assert "!" in fid.compare(x[:1500], x[1500:1700])["marks"]


def test_b13_precision_of_one_law_against_itself_falls_with_unequal_counts():
    a, b = randn(2000, 130), randn(2000, 130, seed=1)
    equal, unequal = precision_recall(a[:200], b[:200])[0], precision_recall(a, b[:200])[0]
    assert unequal < equal - 0.03


def test_inception_resizes_without_antialiasing():
    """As FID's own network: of 897 pixels every third one is kept as it is."""
    with torch.device("meta"):
        network = fid.Inception()
    seen = []

    def stop(layer, inputs):
        seen.append(inputs[0])
        raise StopIteration

    network.Conv2d_1a_3x3.register_forward_pre_hook(stop)
    x = torch.rand(1, 3, 897, 897)
    with pytest.raises(StopIteration):
        network(x)
    torch.testing.assert_close(seen[0], 2 * x[:, :, 1::3, 1::3] - 1, rtol=0, atol=1e-4)


def test_counts_are_unequal_from_more_than_twice_on():
    x = torch.randn(301, 2, generator=torch.Generator().manual_seed(0))
    for n, marked in ((301, True), (300, False)):
        assert ("!" in fid.compare(x[:n], x[:150])["marks"]) == marked
        assert ("!" in fid.compare(x[:150], x[:n])["marks"]) == marked
