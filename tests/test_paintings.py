"""Section 4.2.2: colours and their labels, folders of paintings, the embedded painter."""

import numpy as np
import pytest

from data import COLOURS, lab_to_rgb, mean_colour, nearest_colour, rgb_to_lab

NAMES = list(COLOURS)

# ---------------------------------------------------------------------------------------------------- colours

# Published CIE-LAB values (D65, 2 degrees; brucelindbloom.com's calculator): the corners of sRGB, and grey
ANCHORS = {
    (0, 0, 0): (0, 0, 0),
    (255, 255, 255): (100, 0, 0),
    (255, 0, 0): (53.2408, 80.0925, 67.2032),
    (0, 255, 0): (87.7347, -86.1827, 83.1793),
    (0, 0, 255): (32.2970, 79.1875, -107.8602),
    (0, 255, 255): (91.1132, -48.0875, -14.1312),
    (255, 0, 255): (60.3242, 98.2343, -60.8249),
    (255, 255, 0): (97.1393, -21.5537, 94.4780),
    (128, 128, 128): (53.5850, 0, 0),
}


def test_lab_of_published_anchors():
    """E64: the corners of sRGB, and the scales of the two spaces."""
    colours, lab = np.array(list(ANCHORS)), np.array(list(ANCHORS.values()))
    assert np.abs(rgb_to_lab(colours) - lab).max() < 1e-4
    assert np.abs(rgb_to_lab(colours.astype(np.uint8)) - lab).max() < 2e-4
    assert np.abs(lab_to_rgb(lab) - colours).max() < 0.01
    corners = np.array(list(ANCHORS.values()))[:8]
    apart = np.linalg.norm(corners[:, None] - corners, axis=-1)
    assert apart[0, 1] == 100 and abs(apart.max() - 258.7) < 0.05  # black to white is 441.7 in RGB


def test_lab_goes_back_and_forth():
    colours = np.random.default_rng(0).uniform(0, 255, (500, 4, 3))
    assert np.abs(lab_to_rgb(rgb_to_lab(colours)) - colours).max() < 1e-9
    pixels = np.random.default_rng(0).integers(0, 256, (9, 500, 3), np.uint8)
    assert rgb_to_lab(pixels).dtype == rgb_to_lab(pixels.astype(np.float32)).dtype == np.float32
    assert np.abs(rgb_to_lab(pixels) - rgb_to_lab(pixels.astype(float))).max() < 1e-3
    assert np.array_equal(lab_to_rgb(rgb_to_lab(pixels)).round(), pixels)
    assert np.allclose(lab_to_rgb(np.array([[120.0, 0, 0], [-9, 0, 0]])), [[255] * 3, [0] * 3])  # outside: clipped


def lab_by_hand(pixel):
    """CIE-LAB of one pixel from the textbook's formulas, an oracle that shares nothing with data.py."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in pixel)]
    matrix = [(0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041)]
    xyz = [sum(m * v for m, v in zip(row, linear)) / white for row, white in zip(matrix, (0.95047, 1.0, 1.08883))]
    fx, fy, fz = (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in xyz)
    return 116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)


def test_table_4_1_labels_in_its_order():
    assert NAMES == ["orange", "green", "blue", "purple", "yellow", "red", "black", "white"]
    colours = np.array(list(COLOURS.values()))
    assert nearest_colour(colours).tolist() == nearest_colour(rgb_to_lab(colours), "lab").tolist() == list(range(8))


def test_nearest_colour_against_a_plain_loop():
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 4, 3), np.uint8)
    images[:20] //= 3
    for space, convert in (("rgb", lambda pixel: pixel), ("lab", lab_by_hand)):
        expected = []
        for image in images.tolist():
            pixels = [convert(pixel) for row in image for pixel in row]  # to LAB first, then the mean (E39)
            mean = [sum(values) / len(pixels) for values in zip(*pixels)]
            distances = [sum((m - v) ** 2 for m, v in zip(mean, convert(label))) for label in COLOURS.values()]
            expected.append(distances.index(min(distances)))
        assert nearest_colour(mean_colour(images, space), space).tolist() == expected
    half = np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)
    assert mean_colour(half, "lab")[0] == pytest.approx(50, abs=1e-3)  # the mean RGB, (127.5,) * 3, would have L = 53.4


def test_greys_are_purple_in_rgb():
    """E38: fig. 4.2's mismatch is a property of the rule: greys from 65 to 159 are nearest to purple in RGB, never in LAB."""
    greys = np.arange(256)[:, None].repeat(3, 1)
    names = np.array(NAMES)[nearest_colour(greys)]
    assert (names[:64] == "black").all() and (names[65:160] == "purple").all() and (names[160:] == "white").all()
    assert names[64] == "green"  # a tie of black, green and purple: the first in the table's order
    in_lab = np.array(NAMES)[nearest_colour(rgb_to_lab(greys), "lab")]
    assert (in_lab[:119] == "black").all() and (in_lab[119:] == "white").all()
    assert NAMES[nearest_colour([120, 110, 90])] == "purple"  # a muted brown
