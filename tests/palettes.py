"""How true are the colours of a palette model?

    python tests/palettes.py RUN PICTURE [COUNT]     256 unseen palettes, 64 colours and 64 pairs

First table: the transport distance (`fid.palette_distance`) between the palette that was asked for
and that of the picture. The palettes are those of painted pictures that no model has seen; "chance"
asks for one palette and looks at the picture of another; "first stage" looks at the reconstruction
of the real picture. Then single colours: how far is the dominant colour from the one asked for?
Then pairs of opposite hues: are both there, with a share above 10 % and nearer than Delta-E 20?
PICTURE shows nine steps from one colour to another, straight in LAB and from the same noise.
"""

import colorsys
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import fid
import ldm
import plots
import sample

HOW = {"sampler": "dpm", "steps": 20}


def palettes_of(images):
    return np.stack(list(data.threaded(data.palette, images)))


def distances(asked, images):
    return np.array([fid.palette_distance(p, q) for p, q in zip(asked, palettes_of(images))])


def unseen(model, count):
    """Distances on the palettes of `count` unseen pictures: name -> (count,)."""
    seeds = range(4 * 10**6, 4 * 10**6 + count)
    size = model.shape[1] * model.first_stage.factor
    real = np.stack(list(data.threaded(lambda seed: data.paint(seed, seed % 8, size), seeds)))
    asked = palettes_of(real)
    parts = np.array_split(real, -(-count // 16))
    reconstructed = np.concatenate([sample.reconstruct(model.first_stage, part) for part in parts])
    found = {"chance": distances(np.roll(asked, 1, axis=0), real)}
    found["first stage"] = distances(asked, reconstructed)
    for scale in (1.0, 2.0, 5.0):
        images = sample.generate(model, torch.from_numpy(asked), scale=scale, **HOW)
        found[f"scale {scale:g}"] = distances(asked, images)
    return found


def hex_of(rgb):
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)


def single_colours(model, count, scale):
    """Delta-E of the dominant colour from the asked one, (count,)."""
    rng = np.random.default_rng(0)
    asked = np.stack([data.read_colours([hex_of(rng.random(3))]) for _ in range(count)])
    images = sample.generate(model, torch.from_numpy(asked), scale=scale, **HOW)
    return np.linalg.norm(palettes_of(images)[:, 0, :3] - asked[:, 0, :3], axis=1)


def opposite_hues(model, count, scale):
    """For pairs of opposite hues: is each there? (count, 2) bool."""
    hues = (np.arange(count) + 0.5) / (2 * count)
    words = [[hex_of(colorsys.hsv_to_rgb(h + k, 0.9, 0.8)) for k in (0, 0.5)] for h in hues]
    asked = np.stack([data.read_colours(pair) for pair in words])
    images = sample.generate(model, torch.from_numpy(asked), scale=scale, **HOW)
    thumbnails = np.stack([data.fit(image, 64) for image in images])
    pixels = data.rgb_to_lab(thumbnails).reshape(count, 1, -1, 3)
    near = np.linalg.norm(pixels - asked[:, :2, None, :3], axis=-1) < 20
    return near.mean(-1) > 0.1


def interpolation(model, first, last, steps=9, seed=0):
    """Pictures on the straight line in LAB from one colour to another, from the same noise."""
    a, b = (torch.from_numpy(data.read_colours([word])) for word in (first, last))
    asked = torch.stack([torch.lerp(a, b, share) for share in torch.linspace(0, 1, steps)])
    return sample.generate(model, asked, seeds=[seed] * steps, **HOW)


def main():
    if len(sys.argv) < 3:
        raise data.UserError("expected a run of --condition palette, and the name of a picture")
    model = sample.load(sys.argv[1])
    if not isinstance(model, ldm.PaletteDiffusion):
        raise data.UserError(f"{sys.argv[1]}: knows labels only; train.py --condition palette")
    data.tune("cpu")
    if data.computes_bf16("cpu"):
        model.compute_in_bf16()
    paths = [interpolation(model, *pair) for pair in (("gold", "navy"), ("white", "darkred"))]
    plots.save(sample.tiles(np.concatenate(paths), 9, side=128), sys.argv[2])
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 256
    for name, values in unseen(model, count).items():
        error = values.std() / len(values) ** 0.5
        print(f"{name:12} {values.mean():6.2f} +- {error:.2f}  median {np.median(values):6.2f}")
    for scale in (1.0, 2.0, 5.0):
        single = single_colours(model, min(64, count), scale).mean()
        both = opposite_hues(model, min(64, count), scale).all(1).mean()
        print(f"scale {scale:g}: one colour, Delta-E {single:5.2f};  both hues there {both:.0%}")


if __name__ == "__main__":
    data.run_program(main)
