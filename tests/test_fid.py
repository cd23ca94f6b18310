"""Sections 4.4.7, 5.1, 5.3.1, 5.4 and 6.2: the metrics against closed forms and scipy, the Inception network against published
values, every kind of set, and the command line."""

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
from data import ALPHABET, COLOURS, rgb_to_lab
from fid import (
    COLOUR_METRICS,
    Inception,
    Measured,
    Source,
    Statistics,
    colour_distances,
    frechet_distance,
    gradient_energy,
    kernel_distance,
    kernel_distance_of_images,
    letters_features,
    load_inception,
    mean_colour_distances,
    measure,
    open_source,
    paintings_features,
    precision_recall,
    psnr,
    variety,
)

GOLDEN = Path(__file__).parent / "golden"


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(x, batch=64):
    s = Statistics()
    for part in x.split(batch):
        s.add(part)
    return s


def distance(x, y):
    return frechet_distance(statistics(x), statistics(y))


def with_moments(mean, cov, n, seed=0):
    """n rows whose sample mean and covariance are exactly these; cov: (d, d) of full rank, n > d."""
    x = randn(n, len(mean), seed=seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return x @ torch.linalg.cholesky(cov).T + mean


# ---------------------------------------------------------------------------------------------------- reconstructions, variety


def test_psnr():
    x = torch.zeros(2, 3, 4, 4)
    assert psnr(x, x + torch.tensor([0.2, 2.0])[:, None, None, None]).tolist() == pytest.approx([20.0, 10 * np.log10(4)])


def test_gradient_energy_is_of_neighbours_and_falls_with_blur():
    ramp = (torch.arange(8.0) / 8).expand(1, 3, 8, 8)
    assert gradient_energy(ramp).item() == pytest.approx(1 / 8)
    x = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert gradient_energy(torch.nn.functional.avg_pool2d(x, 3, 1, 1)) < 0.5 * gradient_energy(x)


def test_variety_is_the_mean_distance_of_two_images():
    images = np.zeros((2, 3, 4, 4, 3), np.uint8)
    images[1, 0] = 30
    assert variety(images).tolist() == pytest.approx([0, 20])


# ---------------------------------------------------------------------------------------------------- Frechet distance


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_running_moments_are_those_of_all_rows_at_once(batch):
    x = 100 + randn(300, 20)  # far from 0, where sums of squares would lose digits
    s = statistics(x, batch)
    mean, rows, cov = s.moments()
    assert s.count == 300 and rows is None and s.rows == []  # nothing is kept but the sums
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(cov, torch.cov(x.T), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("counts", [(5, 6), (5, 200), (200, 5), (200, 100), (15, 10)])
def test_merged_moments_are_those_of_both(counts):
    x, y = randn(counts[0], 20), 3 + randn(counts[1], 20, seed=1)
    both = statistics(x)
    both.merge(statistics(y))
    both.merge(Statistics())
    mean, rows, cov = both.moments()
    assert both.count == sum(counts) and (rows is None) == (sum(counts) > 20)
    everything = torch.cat([x, y])
    torch.testing.assert_close(mean, everything.mean(0))
    torch.testing.assert_close(rows.T @ rows if cov is None else cov, torch.cov(everything.T))


def test_frechet_with_equal_covariances_is_the_distance_of_the_means():
    x, shift = randn(500, 30) @ randn(30, 30, seed=1), randn(30, seed=2)
    assert distance(x, x + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)


def test_frechet_with_commuting_covariances_is_a_sum_over_axes():
    """C1 C2 = C2 C1:  |m1 - m2|^2 + sum_i (sqrt(l_i) - sqrt(k_i))^2 over their common axes."""
    axes = torch.linalg.qr(randn(12, 12)).Q
    one, two = randn(12, seed=1).exp(), randn(12, seed=2).exp()
    m1, m2 = randn(12, seed=3), randn(12, seed=4)
    x, y = (with_moments(m, axes * values @ axes.T, 50, seed=5) for m, values in ((m1, one), (m2, two)))
    expected = (m1 - m2).square().sum() + (one.sqrt() - two.sqrt()).square().sum()
    assert distance(x, y) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("m, n", [(400, 300), (20, 300), (300, 20), (20, 30), (2, 300), (41, 40)])
def test_frechet_equals_scipys_matrix_root_at_every_rank(m, n):
    """40 dimensions: both covariances regular, one singular, both singular."""
    x, y = randn(m, 40) @ randn(40, 40, seed=8) + 1, randn(n, 40, seed=1)
    C1, C2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm((C1 @ C2).astype(complex))
    expected = (x.mean(0) - y.mean(0)).square().sum() + np.trace(C1) + np.trace(C2) - 2 * np.trace(root).real
    assert distance(x, y) == pytest.approx(expected.item(), rel=1e-6)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-9)  # symmetric


def test_frechet_scales_with_the_square_and_is_blind_to_rotation():
    x, y, turn = randn(90, 25), 2 * randn(80, 25, seed=1) + 1, torch.linalg.qr(randn(25, 25, seed=2)).Q
    assert distance(3 * x, 3 * y) == pytest.approx(9 * distance(x, y), rel=1e-9)
    assert distance(x @ turn, y @ turn) == pytest.approx(distance(x, y), rel=1e-9)


def test_identical_sets_have_distance_0():
    """Also with dead features, features given twice, images given twice and hardly more images than features."""
    full = randn(400, 60) * 10 ** torch.linspace(0, -5, 60, dtype=torch.float64)
    dead, double = full.clone(), full.clone()
    dead[:, 10:40], double[:, 30:] = 0, full[:, :30]
    for x in (full, dead, double, full[:61], full[:20], full[:20].repeat(2, 1), full[:2], full[:1].repeat(9, 1)):
        assert 0 <= distance(x, x.clone()) < 1e-6


def test_frechet_is_biased_upwards_and_unequal_counts_do_not_compare():
    """E61: two samples of one law; the distance falls with the count, so 142 images look worse than 5,889."""
    distances = [distance(randn(n, 64), randn(2000, 64, seed=1)) for n in (30, 142, 1000)]
    assert distances[0] > 1.5 * distances[1] > 3 * distances[2] > 0
    assert torch.linalg.matrix_rank(torch.cov(randn(30, 64).T)) == 29


# ---------------------------------------------------------------------------------------------------- small sets


def test_kernel_distance_equals_its_definition():
    x, y = randn(7, 5), randn(9, 5, seed=1) + 0.5

    def mean(a, b, skip):
        return np.mean([(a[i] @ b[j] / 5 + 1) ** 3 for i in range(len(a)) for j in range(len(b)) if not skip or i != j])

    def direct(x, y):
        return mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)

    value, error = kernel_distance(x, y)
    assert value == pytest.approx(direct(x, y), rel=1e-10)
    without_x = [direct(torch.cat([x[:i], x[i + 1 :]]), y) for i in range(7)]
    without_y = [direct(x, torch.cat([y[:i], y[i + 1 :]])) for i in range(9)]
    assert error == pytest.approx(math.sqrt(6 * np.var(without_x) + 8 * np.var(without_y)), rel=1e-9)
    assert all(math.isnan(number) for number in kernel_distance(x[:1], y))


def test_kernel_distance_is_unbiased_and_its_error_is_the_spread():
    """Over 300 draws of two laws a known distance apart, at sizes where the Frechet distance is mostly bias.

    x ~ N(0, I), y ~ N(mu, I): with g = x . y the kernel is 1 + 3 g/d + 3 g^2/d^2 + g^3/d^3, and all means are known.
    """
    d, shift = 4, 0.7
    mu2 = d * shift**2  # |mu|^2

    def expected_kernel(u2, v2, uv):  # of u, v with means of those squared lengths and that product
        second = uv**2 + u2 + v2 + d
        third = uv**3 + 3 * uv * (u2 + v2 + d + 2)
        return 1 + 3 * uv / d + 3 * second / d**2 + third / d**3

    truth = expected_kernel(0, 0, 0) + expected_kernel(mu2, mu2, mu2) - 2 * expected_kernel(0, mu2, 0)
    draws = [kernel_distance(randn(30, d, seed=2 * i), randn(40, d, seed=2 * i + 1) + shift) for i in range(300)]
    values, errors = np.array(draws).T
    assert abs(values.mean() - truth) < 3 * values.std() / math.sqrt(len(values))
    assert errors.mean() == pytest.approx(values.std(), rel=0.2)
    same = np.array([kernel_distance(randn(10, d, seed=2 * i), randn(10, d, seed=2 * i + 1))[0] for i in range(300)])
    assert abs(same.mean()) < 3 * same.std() / math.sqrt(len(same)) and (same < 0).any()


def test_precision_and_recall_where_the_answer_is_known():
    """The real ones fill two places far apart; what is generated fills one of them, both, or a place of its own."""
    here, there, nowhere = (0.1 * randn(50, 8, seed=i) + 100 * i for i in range(3))
    real = torch.cat([here, there])
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, here) == (1, 0.5)  # modes dropped: precise, half is missing
    assert precision_recall(here, real) == (0.5, 1)
    assert precision_recall(real, torch.cat([here, there, nowhere, nowhere])) == (0.5, 1)  # half is unlike anything real
    assert precision_recall(here, nowhere) == (0, 0)
    assert all(math.isnan(share) for share in precision_recall(real, here[:3]))
    collapsed = here[:1].repeat(50, 1)
    assert precision_recall(collapsed, collapsed) == (1, 1)  # balls of radius 0 still reach their centre


def test_precision_and_recall_do_not_depend_on_the_chunks(monkeypatch):
    x, y = randn(130, 3), randn(70, 3, seed=1) * 0.7
    whole = precision_recall(x, y), kernel_distance(x, y)
    monkeypatch.setattr(fid, "CHUNK", 13)
    assert precision_recall(x, y) == whole[0] and kernel_distance(x, y) == pytest.approx(whole[1], rel=1e-9)
    brute = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, 3]
    inside = torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist") <= brute
    assert whole[0][0] == inside.any(1).double().mean().item()


# ---------------------------------------------------------------------------------------------------- Inception


def fill(name, shape):
    """The rule of the golden values: numbers that depend on the name alone (gain sqrt(2), for relu)."""
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
    """A weight file in the published layout: (path, sha256). As in old files, the counters of the norms are left out."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({k: v.float() for k, v in inception.state_dict().items() if not k.endswith("num_batches_tracked")}, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_inception_has_the_names_and_shapes_of_the_published_file(inception):
    layout = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for line in (GOLDEN / "inception_layout.txt").read_text().splitlines():
        name, *shape = line.split()
        layout[f"{name}.conv.weight"] = tuple(map(int, shape))
        layout |= {f"{name}.bn.{part}": (int(shape[0]),) for part in ("weight", "bias", "running_mean", "running_var")}
        layout[f"{name}.bn.num_batches_tracked"] = ()
    assert {name: tuple(value.shape) for name, value in inception.state_dict().items()} == layout
    assert len(layout) == 566 and sum(p.numel() for p in inception.parameters()) == 23_850_960


def test_inception_features_equal_the_published_tools(inception):
    """In float64, every 32nd of the 2048 features of two images of 32 x 32: the pools, paddings and the resize must all be
    FID's for this."""
    images = np.random.RandomState(zlib.crc32(b"input:fid.a")).random_sample((2, 3, 32, 32))
    with torch.no_grad():
        found = inception(torch.from_numpy(images))
    expected = np.loadtxt(GOLDEN / "inception_features.txt").T
    assert found.shape == (2, 2048) and np.abs(found[:, ::32].numpy() - expected).max() < 1e-9


def test_inception_weights_are_checked(inception_weights, tmp_path):
    path, sha256 = inception_weights
    network = load_inception(path, sha256)
    assert not network.training
    assert torch.equal(network.fc.bias, torch.from_numpy(fill("fc.bias", (1008,))).float())
    with pytest.raises(data.UserError, match=f"not Inception's published weights \\(sha256 {sha256[:8]}"):
        load_inception(path)
    with pytest.raises(data.UserError, match="No such file"):
        load_inception(tmp_path / "nothing.pth")


def test_inception_stays_in_float32(inception_weights):
    features = fid.inception_features(load_inception(*inception_weights))
    images = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = features(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(images), plain) and plain.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------- offline features


def test_paintings_features_see_colour_and_scale_and_nothing_else():
    features = paintings_features()
    stripes = {w: np.indices((64, 64))[1] // w % 2 * 200 + 20 for w in (1, 4, 16)}
    images = {f"stripes {w}": np.repeat(grey[..., None], 3, 2) for w, grey in stripes.items()}
    images |= {name: np.full((64, 64, 3), COLOURS[name]) for name in ("red", "blue")}
    images["mirrored"] = images["stripes 4"][:, ::-1]
    images["turned"] = images["stripes 4"].transpose(1, 0, 2)
    x = features(torch.from_numpy(np.stack(list(images.values())).astype(np.uint8)))
    f = dict(zip(images, x))
    assert x.shape == (7, 130) and x.dtype == torch.float32 and x.isfinite().all()
    assert (f["mirrored"] - f["stripes 4"]).norm() < 1e-3
    assert (f["turned"] - f["stripes 4"]).norm() > 1
    assert (f["red"] - f["blue"])[:100].norm() == pytest.approx(8 * math.sqrt(2))  # no box in common: the largest distance
    assert torch.equal(f["red"][100:], f["blue"][100:])  # both plain
    torch.testing.assert_close(f["red"][100:], torch.full((30,), 0.8 * (math.log(0.1) - 2)))  # no differences at any scale
    assert f["stripes 16"][:100].sort().values[-2:].tolist() == pytest.approx([8 * math.sqrt(0.5)] * 2)  # half and half
    across = {w: f[f"stripes {w}"][100:].view(5, 2, 3)[:, 1, 0] for w in (1, 16)}  # of L, by scale
    assert across[1][0] > across[16][0] and across[1][4] < across[16][4]


def test_letters_features_tell_letters_apart():
    """The shipped classifier names most letters of fonts it never saw, and its features follow the letter, not the font."""
    letters = data.open_letters()
    rows = letters.split()[1]
    images, labels = torch.from_numpy(letters.images[rows]).expand(-1, -1, -1, 3), letters.labels[rows]
    features = letters_features()(images)
    assert features.shape == (1040, 64)
    nearest = (torch.cdist(features, features) + torch.eye(1040) * 1e9).argmin(1)
    assert (labels[nearest] == labels).mean() > 0.9


def test_a_letters_classifier_can_be_trained_and_used(tmp_path, monkeypatch):
    letters = data.open_letters()
    letters = data.ImageSet(letters.images[: 26 * 20], letters.labels[: 26 * 20], letters.sources[: 26 * 20], ALPHABET)
    monkeypatch.setattr(fid, "open_letters", lambda: letters)
    share = fid.train_letters_classifier(tmp_path / "own.pt", epochs=8, batch=26)
    assert share > 0.4  # of 26
    assert letters_features(tmp_path / "own.pt")(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape == (2, 64)


def test_any_callable_works_during_training():
    """5.4.1's wish: generated images against stored features of real ones, small samples, any feature function."""
    random = np.random.default_rng(0)
    real, same = random.integers(0, 256, (2, 150, 8, 8, 3), np.uint8)
    grey = same // 4 + 96

    def features(images):
        x = images.float() / 255
        return torch.cat([x.mean((1, 2)), 4 * x.std((1, 2))], 1)

    stored = features(torch.from_numpy(real))
    value, error = kernel_distance_of_images(same, stored, features)
    assert abs(value) < 4 * error
    assert kernel_distance_of_images(grey, stored, features)[0] > 10 * error


# ---------------------------------------------------------------------------------------------------- colour


def test_lab_anchors_give_the_distances_of_both_spaces():
    """E64: black to white is 441.7 in RGB and 100 in LAB, so that lower numbers in LAB mean nothing."""
    white = np.full((4, 4, 3), 255, np.uint8)
    found = dict(zip(COLOUR_METRICS, colour_distances(white, "black")))
    assert found["pixels_rgb"] == pytest.approx(math.sqrt(3) * 255) and found["pixels_lab"] == pytest.approx(100, abs=1e-3)
    assert found["mean_rgb"] == pytest.approx(found["pixels_rgb"]) and found["nearest_rgb"] == found["nearest_lab"] == 0
    assert colour_distances(white, "white") == pytest.approx([0, 0, 1, 0, 0, 1], abs=1e-3)
    np.testing.assert_allclose(rgb_to_lab(np.array(COLOURS["red"])), (53.24, 80.09, 67.20), atol=0.02)
    np.testing.assert_allclose(rgb_to_lab(np.array(COLOURS["blue"])), (32.30, 79.19, -107.86), atol=0.02)


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
        assert all(found[f"mean_{space}"] <= found[f"pixels_{space}"] + 1e-9 for space in ("rgb", "lab"))


def test_figure_5_7_colour_distance_is_that_of_the_evaluation():
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 8, 8, 3), np.uint8)
    expected = [np.mean([colour_distances(x, name)[1] for x in row]) for name, row in zip(list(COLOURS), images)]
    np.testing.assert_allclose(mean_colour_distances(images, list(COLOURS)), expected)
    assert mean_colour_distances(images, ["A", "B"]) is None


# ---------------------------------------------------------------------------------------------------- sets


def write_set(root, labels=("yellow", "red"), count=6, size=(32, 32), seed=0, noise=60, mode="RGB"):
    """Images of the label's colour with noise, one folder a label; for the label "" flat in `root`."""
    random = np.random.default_rng(seed)
    for label in labels:
        (root / label).mkdir(parents=True)
        for i in range(count):
            colour = np.array(COLOURS.get(label.lower(), (99, 99, 99)))
            image = np.clip(colour + random.normal(0, noise, (*size[::-1], 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).convert(mode).save(root / label / f"{i}.png")
    return root


def colour_features(images):
    return images.float().flatten(1, 2).mean(1) / 255


def measured(path, tmp_path, size=32, **how):
    source = open_source(path, tmp_path)
    source.size = size
    return dict(measure(source, colour_features, **how)), source


def test_labels_come_in_the_order_of_table_4_1_whatever_the_folders_are_called(tmp_path):
    groups, source = measured(write_set(tmp_path / "set", ("Yellow", "black", "Orange"), 3), tmp_path)
    assert list(groups) == ["orange", "yellow", "black"] and source.counts() == {"orange": 3, "yellow": 3, "black": 3}
    for name, group in groups.items():
        assert group.kept.mean(0).sub(torch.tensor(COLOURS[name]) / 255).abs().max() < 0.2
        assert group.colour_means()["nearest_rgb"] == 1


def test_every_kind_of_set_gives_the_same_numbers(tmp_path):
    """A folder tree, the same tree packed, an .npz (compressed or not), with and without worker processes."""
    root = write_set(tmp_path / "set", count=5)
    packed = data.open_packed(root, 32)
    names = np.array(packed.classes)[packed.labels]
    np.savez(tmp_path / "plain.npz", images=packed.images, labels=names)
    np.savez_compressed(tmp_path / "small.npz", images=packed.images, labels=names)
    expected, _ = measured(root, tmp_path)
    for path in (tmp_path / "set.packed32", tmp_path / "plain.npz", tmp_path / "small.npz"):
        groups, _ = measured(path, tmp_path, batch=2)
        assert list(groups) == ["yellow", "red"]
        for label, group in groups.items():
            torch.testing.assert_close(group.colours, expected[label].colours)
            torch.testing.assert_close(group.kept.sort(0).values, expected[label].kept.sort(0).values)
    workers, _ = measured(root, tmp_path, workers=2, batch=2)
    assert all(torch.equal(workers[label].kept, group.kept) for label, group in expected.items())


def test_numbers_as_labels_count_letters_and_flat_sets_have_none(tmp_path):
    images = np.zeros((4, 9, 7), np.uint8)
    np.savez(tmp_path / "letters.npz", images=images, labels=np.array([2, 0, 2, 2]))
    np.savez(tmp_path / "flat.npz", images=images)
    assert open_source(tmp_path / "letters.npz", tmp_path).counts() == {"A": 1, "C": 3}
    assert open_source(tmp_path / "flat.npz", tmp_path).counts() == {"all": 4}
    assert open_source(write_set(tmp_path / "flat", [""]), tmp_path).counts() == {"all": 6}
    deep = write_set(tmp_path / "archive" / "Images" / "Images", ["A", "B"])
    assert open_source(tmp_path / "archive", tmp_path).counts() == open_source(deep, tmp_path).counts() == {"A": 6, "B": 6}
    assert open_source("letters:validation", tmp_path).counts() == dict.fromkeys(ALPHABET, 40)


def test_parts_of_the_sets_that_come_along(tmp_path, monkeypatch):
    painted = data.paint_set(tmp_path / "painted.packed32", 32, count=32, processes=1)
    monkeypatch.setitem(fid.BUILT_IN, "paintings", lambda: painted)
    train, validation = (open_source(f"paintings:{part}", tmp_path) for part in ("train", "validation"))
    assert list(train.counts()) == list(COLOURS) and len(train) + len(validation) == 32 and len(validation) >= 8
    validation.size = 32
    found = {validation[i][0].numpy().tobytes() for i in range(len(validation))}
    assert found == {image.tobytes() for image in painted.images[painted.split()[1]]}


def test_every_size_and_mode_goes_through_one_anti_aliased_resize(tmp_path):
    """User demand 25: large and small, wide, grey and transparent images in one folder; fine lines become grey."""
    root = tmp_path / "set"
    root.mkdir()
    lines = np.zeros((256, 256), np.uint8)
    lines[:, ::2] = 255
    Image.fromarray(lines).save(root / "0.png")
    Image.fromarray(np.repeat(lines, 2, 1)).convert("RGBA").save(root / "1.png")
    Image.fromarray(lines[:16, :16]).convert("P").save(root / "2.png")
    source = open_source(root, tmp_path)
    source.size = 64
    images, colours, sizes = fid.collate([source[i] for i in range(3)])
    assert images.shape == (3, 64, 64, 3) and images.dtype == torch.uint8
    assert (images[0, :, 4:-4].int() - 127).abs().max() < 20
    assert sizes.tolist() == [[256, 256], [512, 256], [16, 16]] and colours.isnan().all()


def test_the_kept_features_are_a_fair_sample(tmp_path):
    """Rows come in a fixed random order, so the first few are a sample of all; joined, labels keep their shares."""
    images = np.arange(200, dtype=np.uint8)[:, None, None].repeat(2, 1).repeat(2, 2)
    source = Source("set", images, np.arange(200) % 4 // 3, ["many", "few"])
    source.size = 2
    groups = dict(measure(source, colour_features, keep=40))
    assert [len(group.kept) for group in groups.values()] == [40, 40]
    everything = Measured()
    for group in groups.values():
        everything.absorb(group, 40 / 200)
    kept = (everything.kept[:, 0] * 255).round().int()
    assert (len(kept), (kept % 4 == 3).sum().item()) == (40, 10) and len(kept.unique()) == 40
    assert 80 < kept.float().mean() < 120
    assert everything.count == everything.statistics.count == 200
    few = next(measure(source, colour_features, keep=4, batch=50))[1]
    assert few.kept.untyped_storage().nbytes() == 4 * 3 * 4  # not a window on the whole batch, which would stay in memory


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def no_inception(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_command_line_per_label(run, no_inception, tmp_path):
    """Figures 5.5 to 5.7 of two models: one that equals the real set, one whose two labels are exchanged."""
    real = write_set(tmp_path / "real", count=40)
    write_set(tmp_path / "good", count=40, seed=1)
    (tmp_path / "bad").mkdir()
    for a, b in (("red", "yellow"), ("yellow", "red")):
        (tmp_path / "bad" / a).symlink_to(tmp_path / "good" / b)
    out = tmp_path / "out"
    fakes = (f"ldm={tmp_path / 'good'}", f"gan={tmp_path / 'bad'}", f"copy={real}")
    arguments = ("fid", "--real", real, "--per-label", "--size", 32, "--workers", 0, "--out", out)
    code, text, err = run(*arguments, "--fake", *fakes)
    assert code == 0 and "no FID" in err and "FID" not in text and "LAB histogram" in text and "Lanczos to 32 x 32" in text
    assert "compare only rows with equal counts" in text  # 40 images, 130 features
    found = json.loads((out / "evaluation.json").read_text())
    own = {(row["label"], row["set"]): row for row in found["own"]}
    assert list(own)[:3] == [("yellow", "ldm"), ("yellow", "gan"), ("yellow", "copy")]
    for label in ("yellow", "red"):
        ldm, gan, copy = (own[label, name] for name in ("ldm", "gan", "copy"))
        assert (ldm["images"], ldm["real"]) == (40, 40)
        assert gan["frechet"] > 5 * ldm["frechet"] > 0 and abs(copy["frechet"]) < 1e-6
        assert gan["kernel"] > 10 * abs(ldm["kernel"]) and gan["kernel"] > 5 * gan["kernel_error"]
        assert ldm["precision"] > 0.5 and gan["precision"] == 0 and copy["precision"] == copy["recall"] == 1
    every = {(row["label"], row["set"]): row for row in found["all"]}
    assert every["all", "gan"]["frechet"] == pytest.approx(every["all", "ldm"]["frechet"])  # the same images, wrong labels
    assert every["red", "ldm"]["real"] == 80 and every["red", "ldm"]["precision"] > 0.5
    assert every["red", "ldm"]["frechet"] > own["red", "ldm"]["frechet"]
    colour = {(row["label"], row["set"]): row for row in found["colour"]}
    assert {name for _, name in colour} == {"real", "ldm", "gan", "copy"}
    assert colour["red", "real"]["nearest_rgb"] == 1 and colour["red", "gan"]["nearest_lab"] == 0
    assert colour["all", "gan"]["mean_rgb"] > 3 * colour["all", "real"]["mean_rgb"]
    assert all(row["mean_lab"] <= row["pixels_lab"] for row in found["colour"])
    for name in ("figure_5_5", "kernel_distance", "figure_5_6", "figure_5_7"):
        assert Image.open(out / f"{name}.png").size == (900, 660)


def test_two_images_a_label_have_a_kernel_distance_without_an_error(run, no_inception, tmp_path):
    real, fake, out = write_set(tmp_path / "real", count=2), write_set(tmp_path / "fake", count=2, seed=1), tmp_path / "out"
    arguments = ("--real", real, "--fake", fake, "--per-label", "--size", 32, "--workers", 0, "--out", out)
    code, _, err = run("fid", *arguments)
    assert code == 0, err
    row = json.loads((out / "evaluation.json").read_text())["own"][0]
    assert np.isfinite(row["kernel"]) and row["kernel_error"] is None and row["precision"] is None
    assert Image.open(out / "kernel_distance.png").size == (900, 660)


def test_statistics_are_saved_and_reused(run, refused, no_inception, tmp_path):
    real = write_set(tmp_path / "real", count=5)
    fake = write_set(tmp_path / "fake", count=5, seed=1)
    saved, arguments = tmp_path / "real.pt", ("--fake", fake, "--per-label", "--size", 32)
    code, *_ = run("fid", "--real", real, *arguments, "--save-real", saved, "--out", tmp_path / "one")
    for file in real.rglob("*.png"):
        file.unlink()  # not needed any more
    code_again, *_ = run("fid", "--real", saved, *arguments, "--out", tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert code == code_again == 0 and one | {"real": ""} == two | {"real": ""} and len(one["own"]) == 2
    assert "measured with" in refused("fid", "--real", saved, "--fake", fake, "--size", 64, "--out", tmp_path / "two")
    saved.write_bytes(saved.read_bytes()[:1000])
    assert "not a file that --save-real wrote" in refused("fid", "--real", saved, *arguments, "--out", tmp_path / "two")


def test_command_line_says_fid_of_inception_only(run, inception_weights, tmp_path, monkeypatch):
    path, sha256 = inception_weights
    monkeypatch.setattr(fid.load_inception, "__defaults__", (sha256,))
    real = write_set(tmp_path / "real", [""], 3)
    code, text, _ = run(
        "fid", "--real", real, "--fake", f"same={real}", "--size", 32, "--inception", path, "--out", tmp_path / "out"
    )
    assert code == 0 and "FID" in text and "KID" in text and "Inception pool features (2048)" in text and "to 32 x 32" in text
    row = json.loads((tmp_path / "out" / "evaluation.json").read_text())["all"][0]
    assert row["frechet"] < 1e-6 and row["precision"] is None  # three images have no third neighbour
    assert not (tmp_path / "out" / "figure_5_6.png").exists()  # no labels, no colours to be distant from


def test_colours_only_and_notes_on_sizes(run, tmp_path):
    real, fake = write_set(tmp_path / "real", count=2, size=(90, 64)), write_set(tmp_path / "fake", count=3, size=(16, 16))
    write_set(tmp_path / "fake" / "deeper", ["red"], 1)
    (tmp_path / "fake" / "red" / "wide.png").write_bytes((tmp_path / "real" / "red" / "0.png").read_bytes())
    (tmp_path / "fake" / "deeper" / "red" / "0.png").unlink()
    for folder in (tmp_path / "fake" / "deeper" / "red", tmp_path / "fake" / "deeper"):
        folder.rmdir()
    code, text, _ = run("fid", "--real", real, "--fake", fake, "--features", "none", "--size", 32, "--out", tmp_path / "out")
    assert code == 0 and "note: fake: sizes from 16 x 16 to 90 x 64" in text and "fig. 5.6" in text
    assert not (tmp_path / "out" / "figure_5_5.png").exists() and (tmp_path / "out" / "figure_5_7.png").exists()


@pytest.fixture
def bad(tmp_path):
    """name -> (arguments, words of the message)"""
    good = write_set(tmp_path / "good", count=3)
    (tmp_path / "empty").mkdir()
    write_set(tmp_path / "one", [""], 1)
    write_set(tmp_path / "single", count=3)
    for i in (1, 2):
        (tmp_path / "single" / "red" / f"{i}.png").unlink()
    write_set(tmp_path / "hollow", count=1)
    (tmp_path / "hollow" / "red" / "0.png").unlink()
    broken = write_set(tmp_path / "broken", count=3)
    png = (broken / "red" / "1.png").read_bytes()
    (broken / "red" / "1.png").write_bytes(png[: len(png) // 2])
    (write_set(tmp_path / "mixed", count=3) / "stray.png").write_bytes(png)
    flat, other = write_set(tmp_path / "flat", [""], 3), write_set(tmp_path / "other", ["yellow", "blue"], 3)
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "keys.npz", pictures=np.zeros(3))
    np.savez(tmp_path / "float.npz", images=np.zeros((3, 8, 8)))
    (tmp_path / "wrong.pth").write_text("not the weights")
    np.savez_compressed(tmp_path / "torn.npz", images=np.random.default_rng(0).integers(0, 9, (30, 8, 8), np.uint8))
    torn = bytearray((tmp_path / "torn.npz").read_bytes())
    torn[100:400] = bytes(300)
    (tmp_path / "torn.npz").write_bytes(torn)
    np.savez(tmp_path / "number.npz", images=np.uint8(3))
    for name, labels in (("void", None), ("beyond", [0, 1, 7])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "set.json").write_text('{"classes": ["red", "blue"]}')
        np.save(tmp_path / name / "images.npy", np.zeros((3, 32, 32, 3), np.uint8))
        np.save(tmp_path / name / "labels.npy", labels or [0, 1, 1])
    (tmp_path / "void" / "labels.npy").write_bytes(b"")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    per_label = ("--per-label",)
    return {
        "damaged archive": ((good, tmp_path / "torn.npz"), "not an .npz file"),
        "npz of one number": ((good, tmp_path / "number.npz"), "not an .npz file"),
        "empty file in a packed set": ((good, tmp_path / "void"), "a packed set that cannot be read"),
        "labels without a name": ((good, tmp_path / "beyond"), "labels without a name"),
        "a tensor as measured images": ((tmp_path / "tensor.pt", good), "not a file that --save-real wrote"),
        "empty folder": ((good, tmp_path / "empty"), "no images in it"),
        "no folder": ((tmp_path / "nothing", good), "no such file or folder"),
        "one image": ((good, tmp_path / "one"), "only 1 image"),
        "one image of a label": ((good, tmp_path / "single", *per_label), "label red has 1 image"),
        "empty label": ((good, tmp_path / "hollow"), "red: no images in it"),
        "damaged file": ((good, broken), "1.png: not an image that can be read"),
        "damaged file in a worker": ((good, broken, "--workers", 1), "1.png: not an image that can be read"),
        "two layouts at once": ((good, tmp_path / "mixed"), "images both in it and in its folder"),
        "labels on one side": ((good, other, *per_label), f"{other} lacks red; --real lacks blue"),
        "no labels": ((good, flat, *per_label), "no labels; leave out --per-label"),
        "text as npz": ((good, tmp_path / "text.npz"), "not an .npz file"),
        "npz without images": ((good, tmp_path / "keys.npz"), "no array images; it holds: pictures"),
        "npz of numbers": ((good, tmp_path / "float.npz"), "expected uint8 images"),
        "wrong weights": ((good, good, "--features", "inception", "--inception", tmp_path / "wrong.pth"), "not Inception's"),
        "no weights": ((good, good, "--features", "inception"), "--download fetches them"),
        "wrong classifier": ((good, good, "--features", "letters", "--classifier", good), "not a letters classifier"),
        "letters at another size": ((good, good, "--features", "letters", "--size", 64), "takes 32 pixels"),
        "a part that is not there": (("letters:test", good), "letters:train or letters:validation"),
        "same name twice": ((good, good, f"good={flat}"), "the name 'good' is taken"),
        "no device": ((good, good, "--device", "cuda:99"), "not there on this machine"),
        "nothing kept": ((good, good, "--keep", 0), "--keep 4 or more"),
        "a file in the way": ((good, good, "--out", tmp_path / "text.npz"), "a file of that name is there"),
    }


def test_bad_input_is_one_clear_line_and_nothing_is_lost(refused, no_inception, bad, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text("the last evaluation")
    for name, ((real, fake, *more), words) in bad.items():
        extra = [more.pop(0)] if more and "=" in str(more[0]) else []
        message = refused("fid", "--out", tmp_path / "out", "--size", 32, "--real", real, "--fake", fake, *extra, *more)
        assert words in message, (name, message)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["evaluation.json"]
    assert (tmp_path / "out" / "evaluation.json").read_text() == "the last evaluation"
    assert "--real SET and --fake SET" in refused("fid")


def test_downloads_are_checked(monkeypatch, no_inception, refused, tmp_path):
    """Without a network: the address, the hash that is asked for, and one clear line where it fails."""

    def no_network(url, path, hash_prefix):
        assert url.endswith("pt_inception-2015-12-05-6726825d.pth") and hash_prefix == fid.INCEPTION_SHA256
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    real = write_set(tmp_path / "real", [""], 2)
    assert "could not be fetched (no network)" in refused("fid", "--real", real, "--fake", f"same={real}", "--download")
