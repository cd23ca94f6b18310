"""Data for those who have none: abstract pictures of a given colour, and letters from fonts.

Nothing here is part of the thesis. Its paintings are a private selection; `paint` makes pictures in
their place. `letters_from_fonts` makes a set like the Kaggle letters of section 4.2.1.
"""

import csv
from collections import Counter
from string import ascii_uppercase

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# 4.2.2  Pictures of a given colour
# --------------------------------------------------------------------------------------------------

VERSION = 1  # raise it when the pictures change, so that no old set is used
PIGMENTS = {
    "ivory black": (28, 26, 30), "titanium white": (248, 245, 236), "raw umber": (93, 66, 46),
    "burnt sienna": (150, 62, 26), "yellow ochre": (204, 153, 51), "cadmium yellow": (255, 222, 40),
    "cadmium orange": (238, 118, 24), "vermilion": (224, 58, 44), "alizarin": (140, 22, 48),
    "rose": (232, 150, 158), "ultramarine": (30, 40, 138), "cobalt": (0, 88, 180),
    "cerulean": (92, 170, 214), "turquoise": (60, 176, 164), "viridian": (24, 104, 84),
    "sap green": (120, 150, 50), "dioxazine violet": (84, 38, 116), "lilac": (188, 164, 208),
    "naples yellow": (250, 216, 156), "warm grey": (146, 138, 130),
}  # fmt: skip


def paint(rng, size, colours, to_lab, fits, pigments):
    """An abstract picture in the given colours: (size, size, 3) uint8.

    rng       random generator of numpy; the picture is a function of its state
    colours   the one, two or three colours (r, g, b) of most of the picture, 0 to 255
    to_lab    function that converts RGB colours (..., 3) to CIE-LAB
    fits      function that says whether a picture (H, W, 3) needs no more tint of their mean
    pigments  other colours, for mixtures and accents
    """
    easel = Easel(rng, size * 3 // 2, colours, to_lab, pigments)
    composition = COMPOSITIONS[rng.integers(len(COMPOSITIONS))]
    composition(easel, rng)
    if composition in (soft_fields, zips):  # these look best upright
        angle = rng.normal(0, 0.06) + rng.integers(4) * np.pi / 2
    else:
        angle = rng.uniform(0, 2 * np.pi)
    c, s, n = np.cos(angle), np.sin(angle), easel.n
    side = n / (abs(c) + abs(s)) * rng.uniform(0.8, 1)  # at most the largest square at this angle
    k, left, top = side / size, (n - side * (c - s)) / 2, (n - side * (s + c)) / 2
    affine = (k * c, -k * s, left, k * s, k * c, top)
    picture = Image.fromarray(easel.finished()).transform(
        (size, size), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC
    )
    # the weakest tint of the colours' mean after which the picture fits
    thumbnail = np.asarray(picture)[::4, ::4].astype(np.float32)
    tint = np.mean(colours, axis=0) - thumbnail.mean((0, 1))
    for strength in np.linspace(0, 1, 21):
        if fits(np.clip(thumbnail + strength * tint, 0, 255).astype(np.uint8)):
            break
    tint = np.float32(strength + 0.03) * tint.astype(np.float32)
    return np.clip(picture + tint, 0, 255).astype(np.uint8)


def smooth(low, high, t):
    """0 where t is below `low`, 1 above `high`, a smooth step between."""
    t = np.clip((t - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


class Easel:
    """A canvas of n x n pixels, the colours for it, and the ways to put them on it.

    Positions x and y run from -1 to 1. `canvas` (n, n, 4) holds RGB and the height of the paint.
    `accent` is the probability that a stroke takes an accent colour.
    """

    def __init__(self, rng, n, colours, to_lab, pigments):
        self.rng, self.n = rng, n
        self.y, self.x = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j].astype(np.float32)
        self.canvas = np.zeros((n, n, 4), np.float32)
        pigments = np.array(pigments, np.float32)
        count = 6 // len(colours)
        self.mixtures = np.concatenate([self.shades(c, count, pigments) for c in colours])
        self.may_mix = len(colours) == 1  # strokes do not mix several colours; grounds do
        # accents: pigments; the farther one is from the colours, the likelier
        difference = to_lab(pigments) - to_lab(np.array(colours, np.float64))[:, None]
        distance = np.linalg.norm(difference, axis=-1).min(0)
        count, share = rng.integers(2, 5), distance / distance.sum()
        self.accents = rng.choice(pigments, count, replace=False, p=share)

    def shades(self, colour, count, pigments):
        """Darker and lighter shades of a colour, each with a little of some pigment: (count, 3).
        The fewer there are, the nearer they are to the colour."""
        rng, colour = self.rng, np.array(colour, np.float32)
        darkest = 0.55 - 0.4 * colour @ (0.2, 0.6, 0.2) / 255
        steps = np.linspace(-darkest, 0.6, count) + rng.uniform(-0.1, 0.1, count)
        steps = rng.permutation(steps * count / 6)[:, None].astype(np.float32)
        shades = colour + np.abs(steps) * (np.where(steps < 0, 0, 255) - colour)
        share = rng.uniform(0, 0.3, (count, 1)).astype(np.float32)
        return shades + share * (rng.choice(pigments, count) - shades)

    def colour(self, accent):
        """An accent colour with the probability `accent`, else a mixture, or one between two."""
        if self.rng.uniform() < accent:
            return self.rng.choice(self.accents)
        a, b = self.rng.choice(self.mixtures, 2)
        mix = self.rng.uniform()
        return a + (b - a) * (mix if self.may_mix else round(mix))

    def noise(self, across, down=None, shape=None):
        """Smooth noise of `across` x `down` cells, about 0 to 1. shape: (H, W), else the canvas."""
        height, width = shape or (self.n, self.n)
        across, down = int(across), int(down or across)
        cells = self.rng.uniform(0, 1, (down + 2, across + 2)).astype(np.float32)
        cells, box = Image.fromarray(cells), (0.5, 0.5, across + 1.5, down + 1.5)
        return np.asarray(cells.resize((width, height), Image.Resampling.BICUBIC, box))

    def cloud(self, cells, octaves=4):
        """Noise with details: each octave has twice the cells and half the strength."""
        layers = (self.noise(cells << k) * 0.5**k for k in range(octaves))
        return sum(layers) / (2 - 0.5 ** (octaves - 1))

    def ramp(self, t, colours):
        """The colours along t, 0 to 1: an array (..., 3)."""
        places = np.linspace(0, len(colours) - 1, 256)
        channels = [np.interp(places, range(len(colours)), c) for c in np.transpose(colours)]
        table = np.stack(channels, 1).astype(np.float32)
        return table[np.clip(t * 255, 0, 255).astype(np.uint8)]

    def window(self, left, top, right, bottom):
        """The slices of the canvas that hold this box."""
        box = (top, bottom + 0.02, left, right + 0.02)
        a, b, c, d = (int(np.clip((v + 1) / 2 * self.n, 0, self.n)) for v in box)
        return slice(a, b), slice(c, d)

    def lay(self, colour, alpha, height, window=...):
        """Put paint on the window; alpha = 1 covers what was there."""
        under = self.canvas[window]
        under[..., :3] += alpha[..., None] * (colour - under[..., :3])
        under[..., 3] += alpha * (height - under[..., 3])

    def draw(self, shapes):
        """Lay shapes that Pillow draws: (name of its method, points or box, colour, ...)."""
        sheet, mask = (Image.new(mode, (2 * self.n, 2 * self.n)) for mode in ("RGB", "L"))
        colour_pen, mask_pen = ImageDraw.Draw(sheet), ImageDraw.Draw(mask)
        for shape, xy, colour, *more in shapes:
            points = [tuple(point) for point in (np.asarray(xy) + 1) * self.n]
            ink = tuple(np.clip(colour, 0, 255).astype(int))
            getattr(colour_pen, shape)(points, ink, *more)
            getattr(mask_pen, shape)(points, 255, *more)
        alpha = np.asarray(mask.reduce(2), np.float32) / 255  # half the size: smooth edges
        colours = np.asarray(sheet.reduce(2), np.float32) / np.maximum(alpha, 1 / 255)[..., None]
        self.lay(colours, alpha, 0.6 + 0.8 * alpha)

    def finished(self):
        """The picture (n, n, 3) uint8, with light from the upper left and a little canvas."""
        height = self.canvas[..., 3] + 0.1 * self.noise(self.n // 2)
        light = np.zeros_like(height)
        light[1:, 1:] = height[1:, 1:] - height[:-1, :-1]
        return np.clip(self.canvas[..., :3] + 60 * light[..., None], 0, 255).astype(np.uint8)

    def ground(self, contrast=1.0):
        """A brushed ground: streaks in one direction over clouds."""
        rng = self.rng
        streak = 0.6 * self.noise(rng.integers(2, 9), rng.integers(40, 110))
        streak = streak + 0.4 * self.noise(rng.integers(1, 4), rng.integers(10, 40))
        clouds = rng.uniform(0.5, 1.8) * (self.cloud(2, 3) - 0.5)
        t = 0.5 + contrast * (clouds + rng.uniform(0.3, 1) * (streak - 0.5))
        self.lay(self.ramp(t, rng.permutation(self.mixtures)[:4]), np.ones_like(t), streak)

    def marble(self, colours, bands):
        """Marbling: bands of paint, bent by clouds, with fine veins."""
        rng = self.rng
        angle = rng.uniform(0, np.pi)
        bend = rng.uniform(1.2, 3) * (self.cloud(2, 3) + 0.35 * self.cloud(7, 3))
        t = bands * (0.4 * (self.x * np.cos(angle) + self.y * np.sin(angle)) + bend)
        vein = smooth(0.75, 1, np.abs(np.sin(rng.integers(3, 9) * np.pi * t))) * self.noise(5)
        t = np.abs(t % 2 - 1)
        colour = self.ramp(t, colours) + rng.normal(0, 60) * vein[..., None]
        self.lay(colour, np.ones_like(t), 0.5 * t + 0.5 * vein)

    def facets(self, count, accent, tilt):
        """The canvas cut along straight lines; each piece is brushed in its own direction."""
        rng = self.rng
        pieces = [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)]
        while len(pieces) < count:
            areas = [np.ptp(piece, 0).prod() * rng.uniform(0.3, 1) for piece in pieces]
            piece = pieces.pop(int(np.argmax(areas)))
            angle = rng.normal(0, tilt) + rng.choice([0, np.pi / 2])
            pieces += cut(piece, rng.dirichlet(np.full(len(piece), 3.0)) @ piece, angle)
        turn, shapes = Image.new("F", (self.n, self.n)), []
        for piece in pieces:
            shapes.append(("polygon", piece, self.colour(accent)))
            points = [tuple(point) for point in (piece + 1) * self.n / 2]
            ImageDraw.Draw(turn).polygon(points, rng.uniform(0, 6.3))
        self.draw(shapes)
        turn = np.asarray(turn)
        along = self.x * np.cos(turn) + self.y * np.sin(turn) + 0.06 * self.noise(6) + turn
        hair = self.noise(240, 1, shape=(1, 4096))[0][(along * 450).astype(np.int32) % 4096]
        self.canvas[..., :3] += (30 * np.sin(2 * along) + 26 * (hair - 0.5))[..., None]
        self.canvas[..., 3] = hair

    def stroke(self, x, y, radius, start, sweep, width, colour, dry):
        """A brush along an arc around (x, y), in radians. Its bristles run dry one by one."""
        ends = start + sweep * np.linspace(0, 1, 24)
        path = np.stack([x + radius * np.cos(ends), y + radius * np.sin(ends)])
        w = self.window(*(path.min(1) - width), *(path.max(1) + width))
        dx, dy = self.x[w] - np.float32(x), self.y[w] - np.float32(y)
        if not dx.size:
            return
        turn = (np.arctan2(dy, dx) - np.float32(start)) % np.float32(2 * np.pi)
        u = turn / np.float32(sweep)  # along the stroke, 0 to 1
        v = (np.hypot(dx, dy) - np.float32(radius)) / np.float32(width)  # across it, -1 to 1
        column = np.clip(u * 255, 0, 255).astype(np.int32)
        v += 0.12 * (self.noise(7, 1, shape=(1, 256))[0] - 0.5)[column]  # the hand shakes a little
        hairs = max(6, width * self.n / 5)
        brush = 0.65 * self.noise(5, hairs, shape=(128, 256))
        brush = brush + 0.35 * self.noise(24, hairs, shape=(128, 256))
        bristle = brush[np.clip((v + 1) * 63.5, 0, 127).astype(np.int32), column]
        alpha = smooth(0, 6 / (width * self.n), 1 - np.abs(v) - 0.15 * (bristle < 0.4))
        alpha *= smooth(0, 0.2, bristle + 0.35 - 1.2 * dry * u**1.5)
        if sweep < 6.2:  # not a full circle: it has two ends
            alpha *= (u < 1 - 0.12 * bristle) * smooth(0, 0.03, u - 0.05 * bristle)
        second = colour + self.rng.normal(0, 22, 3)
        self.lay(self.ramp(1.3 * bristle - 0.15, [colour, second]), alpha, 1.6 * bristle, w)

    def gesture(self, reach=1.0, accent=0.3):
        """A stroke of the whole arm, anywhere and more or less bent."""
        rng = self.rng
        radius, width = rng.uniform(0.5, 3) * reach, rng.uniform(0.03, 0.22) * reach
        angle = rng.uniform(0, 2 * np.pi)
        x, y = rng.uniform(-0.8, 0.8, 2) - radius * np.array([np.cos(angle), np.sin(angle)])
        sweep = min(5, rng.uniform(0.6, 1.8) * reach / radius)
        colour, dry = self.colour(accent), rng.uniform(0.3, 1.3)
        self.stroke(x, y, radius, angle - sweep / 2, sweep, width, colour, dry)

    def splatter(self, drops):
        """Thrown paint: many drops of two colours, a few of them large."""
        rng, colours = self.rng, [self.colour(0.5), self.colour(0.5)]
        middle = rng.uniform(-0.7, 0.7, 2)
        places = middle + rng.normal(0, rng.uniform(0.15, 0.6), (drops, 2))
        sizes = np.minimum(0.003 + 0.004 * rng.pareto(1.5, drops), 0.07)
        self.draw(
            ("ellipse", [place - size, place + size], colours[i % 2])
            for i, (place, size) in enumerate(zip(places, sizes))
        )

    def drips(self, threads, accent, width):
        """Threads of thrown paint, thick where the hand was slow."""
        rng, t, shapes = self.rng, np.linspace(0, 2 * np.pi, 140), []
        for _ in range(threads):
            place, waves = rng.uniform(-0.9, 0.9, (2, 1)), 0
            for k in (1, 2, 3, 5):
                amplitude, phase = rng.normal(0, 0.8 / k, (2, 1)), rng.uniform(0, 6.3, (2, 1))
                waves = waves + amplitude * np.sin(k * t + phase)
            path = (place + waves).T
            mean = rng.uniform(0.3, 1.5) * width
            thickness = mean * np.exp(3 * self.noise(12, 1, shape=(1, 140))[0] - 1.5)
            colour = self.colour(accent)
            for a, b, half in zip(path, path[1:], thickness):
                shapes.append(("line", [a, b], colour, max(1, int(2 * half * self.n))))
                shapes.append(("ellipse", [b - half, b + half], colour))
        self.draw(shapes)


def cut(polygon, point, angle):
    """The two halves of a convex polygon (corners, 2), cut through a point."""
    side = (polygon - point) @ (np.cos(angle), np.sin(angle))
    halves = [], []
    for a, b, s, t in zip(polygon, np.roll(polygon, -1, 0), side, np.roll(side, -1)):
        halves[int(s > 0)].append(a)
        if (s > 0) != (t > 0):
            for half in halves:
                half.append(a + (b - a) * s / (s - t))
    return [np.array(half) for half in halves if len(half) > 2]


def gestures(easel, rng):
    easel.ground()
    for reach in np.sort(rng.uniform(0.4, 1.9, rng.integers(8, 24)))[::-1]:
        easel.gesture(reach)
    for _ in range(rng.integers(0, 3)):
        easel.splatter(60)


def soft_fields(easel, rng):
    easel.ground(0.35)
    edges = np.cumsum([-0.9, *1.8 * rng.dirichlet(np.full(rng.integers(2, 5), 2.5))])
    for top, bottom in zip(edges, edges[1:]):  # rectangles of thin paint
        for soft in (0.25, 0.08):
            x, y, half_height = rng.normal(0, 0.02), (top + bottom) / 2, (bottom - top) / 2 - 0.02
            half_width, colour = rng.uniform(0.7, 0.85), easel.colour(0.45)
            opacity, wash = rng.uniform(0.5, 0.95), easel.cloud(3)
            edge = np.minimum(half_width - np.abs(easel.x - x), half_height - np.abs(easel.y - y))
            alpha = smooth(0, soft, edge + 0.12 * (easel.cloud(5, 3) - 0.5))
            alpha = alpha * opacity * (0.75 + 0.4 * wash)
            easel.lay(colour + 60 * (wash[..., None] - 0.5), alpha, wash)


def shards(easel, rng):
    easel.facets(rng.integers(10, 70), 0.25, rng.choice([0.05, 0.4, 1.5]))
    for _ in range(rng.integers(0, 4)):
        easel.gesture(0.8, 0.4)


def circles(easel, rng):
    if rng.uniform() < 0.5:
        easel.ground()
    else:
        easel.facets(rng.integers(3, 9), 0.15, 0.3)
    for radius in np.sort(rng.uniform(0.12, 0.8, rng.integers(3, 9)))[::-1]:
        x, y = rng.uniform(-0.8, 0.8, 2)
        while radius > 0.03:  # rings, from the outermost to the centre
            width = min(radius / 2, rng.uniform(0.01, 0.16))
            sweep = 2 * np.pi if rng.uniform() < 0.6 else rng.uniform(1.5, 5)
            start, colour, dry = rng.uniform(0, 6.3), easel.colour(0.35), rng.uniform(0, 0.7)
            easel.stroke(x, y, radius - width, start, sweep, width, colour, dry)
            radius -= 2 * width + rng.choice([0, 0, 0.05])


def threads(easel, rng):
    easel.ground(0.6)
    for _ in range(rng.integers(3, 7)):
        easel.drips(rng.integers(1, 6), 0.45, rng.uniform(0.004, 0.014))
        easel.splatter(60)


def marbling(easel, rng):
    colours = rng.permutation([*easel.mixtures, easel.colour(1)])
    easel.marble(colours, rng.uniform(0.8, 3))
    for _ in range(rng.integers(0, 3)):
        easel.splatter(40)


def shapes(easel, rng):
    if rng.uniform() < 0.6:
        easel.ground(0.7)
    else:
        easel.marble(easel.mixtures[1:4], 0.7)
    for size in np.sort(rng.uniform(0.04, 0.5, rng.integers(6, 18)))[::-1]:
        x, y = rng.uniform(-0.9, 0.9, 2)  # rounded shapes of brushed paint
        colour, soft = easel.colour(0.35), rng.choice([0.01, 0.01, 0.15])
        w = easel.window(x - 1.7 * size, y - 1.7 * size, x + 1.7 * size, y + 1.7 * size)
        dx, dy = easel.x[w] - np.float32(x), easel.y[w] - np.float32(y)
        angle, edge = np.arctan2(dy, dx), 1 - np.hypot(dx, dy) / np.float32(size)
        for k in (1, 2, 3, 5):
            wave = np.float32(rng.normal(0, 0.25 / k))
            edge += wave * np.cos(k * angle + np.float32(rng.uniform(0, 6.3)))
        hair = easel.noise(3, 40 * size + 3, shape=dx.shape)
        alpha = smooth(0, soft / size, edge + 0.1 * (hair - 0.5))
        easel.lay(colour + 45 * (hair[..., None] - 0.5), alpha, 0.8 + 0.7 * hair, w)
    easel.drips(rng.integers(0, 5), 0.7, 0.004)


def zips(easel, rng):
    easel.ground(0.8)
    for x in rng.uniform(-0.9, 0.9, rng.integers(3, 12)):
        width, y = rng.choice([0.015, 0.03, 0.12, 0.3]), rng.uniform(-0.1, 0.1)
        colour, dry = easel.colour(0.4), rng.uniform(0, 1)
        easel.stroke(x - 60, y, 60, -0.018, 0.036, width, colour, dry)  # almost a straight line
    if rng.uniform() < 0.4:
        easel.gesture(1.2, 0.5)


COMPOSITIONS = (gestures, soft_fields, shards, circles, threads, marbling, shapes, zips)

# --------------------------------------------------------------------------------------------------
# 4.2.1  Letters from fonts, in the layout of the Kaggle set
# --------------------------------------------------------------------------------------------------

FONT_SUFFIXES = {".ttf", ".otf", ".ttc", ".otc", ".pfb"}


def letters_from_fonts(fonts, folder):
    """4.2.1: render A to Z of every font below `fonts` to folder/A/<n>.png and so on.

    folder/fonts.csv says which font has the number n, and why a font is left out. `fonts` and
    `folder` are Paths. Returns a Counter of these reasons; "" counts the fonts that are used.
    Raises ValueError if there are none.
    """
    files = sorted(f for f in fonts.rglob("*") if f.suffix.lower() in FONT_SUFFIXES)
    rows, first, reasons = [("n", "file", "rejected")], {}, Counter()
    for letter in ascii_uppercase:
        (folder / letter).mkdir(parents=True)
    for file in tqdm(files, "rendering", unit="font", disable=None):
        name, n = file.relative_to(fonts), reasons[""]
        try:
            letters = render_letters(file)
            if first.setdefault(letters.tobytes(), name) != name:
                raise ValueError(f"same letters as another font: {first[letters.tobytes()]}")
        except ValueError as error:
            reasons[str(error).partition(":")[0]] += 1
            rows.append(("", name, error))
            continue
        for letter, image in zip(ascii_uppercase, letters):
            Image.fromarray(image).save(folder / letter / f"{n}.png")
        rows.append((n, name, ""))
        reasons[""] += 1
    if not reasons[""]:
        why = [f"{len(files)} found", *(f"{count} {reason}" for reason, count in reasons.items())]
        raise ValueError(f"{fonts}: no usable font in it or below it ({', '.join(why)})")
    table = folder / "fonts.csv"
    with table.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows(rows)
    return reasons


def render_letters(file):
    """4.2.1: A to Z of a font, white on black, centred, longer side 30 pixels: (26, 32, 32) uint8.

    Raises ValueError with the reason if these are not 26 different letters.
    """
    letters, known = np.zeros((26, 32, 32), np.uint8), {}
    try:
        face = ImageFont.truetype(str(file), 96)
        missing = glyph(face, "\U0010fffe")  # in no font, so this is the picture for "missing"
        glyphs = [glyph(face, name) for name in ascii_uppercase]
    except (OSError, ValueError) as error:
        raise ValueError(f"not a font that can be drawn: {error}") from None
    for name, image, letter in zip(ascii_uppercase, glyphs, letters):
        if image is None or image == missing:
            raise ValueError(f"{'blank' if image is None else 'missing'} letters: {name}")
        width, height = (max(1, round(side * 30 / max(image.size))) for side in image.size)
        left, top = (32 - width) // 2, (32 - height) // 2
        small = image.resize((width, height), Image.Resampling.LANCZOS)
        letter[top : top + height, left : left + width] = small
        if known.setdefault(letter.tobytes(), name) != name:
            raise ValueError(f"identical letters: {known[letter.tobytes()]} and {name}")
    return letters


def glyph(face, letter):
    """A letter as a grey Pillow image without margins, or None if it is blank."""
    left, top, right, bottom = face.getbbox(letter)
    image = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(image).text((-left, -top), letter, 255, face)
    return image.crop(image.getbbox()) if image.getbbox() else None
