"""Every command of the README, run in its order in a new folder:  python tests/commands.py

As they stand there, but for two things: what a reader has to bring (DIR, PATH, a second machine, published files) is made,
and small; where a command trains or draws many images, flags behind its own make it a matter of seconds, unless the README
says that it is one. `python tests/...` and the bare `pytest` are left out.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import lightning_file
from test_ldm import published

from data import COLOURS, embedded_letters, paint
from vqgan import VQGAN, Codebook

ROOT = Path(__file__).parent.parent
PROGRAM = re.compile(r"(OMP_NUM_THREADS=\d )?(python (?!tests/)|torchrun .*\.py|pytest .|mkdir|(train|sample)\.py --[a-z])")
AGAIN = re.compile(r"(?:and|again with) ((?:--[a-z-]+ [\w/]+ ?)+)")  # a comment that asks for the same once more
SHORTER = {  # what a command contains -> what makes it short
    "train.py --stage": "--updates 2",
    "train.py --stage letters": "--channels 16 --multipliers 1 1 --overfit 26",
    "train.py --stage ldm": "--channels 32 --multipliers 1 1",
    "train.py --stage letters --": "--T 2",
    "train.py --stage ldm --": "--T 2",
    "--model thesis": "--channels 64 --batch 2 --size 64",
    "--kernel-distance": "--kernel-distance 4",
    "sample.py": "--steps 2",
    "--per-label": "--per-label 2",
    "--count": "--count 8",
}
IS_SHORT = re.compile(r"--(help|plan|chart|reconstruct|prior)\b|fid\.py|unet\.py|pytest|mkdir|python -")


def commands(readme):
    """The commands in the README's order, each once, with what is said behind them; of a row of a table what it needs first."""
    found = {}
    for line in re.sub(r"\\\n *", "", readme).splitlines():
        spans = [line[4:]] if line.startswith("    ") else re.findall(r"`([^`]+)`", line)
        spans = [span.removeprefix("pip install -r requirements.txt && ") for span in spans]
        for span in sorted(filter(PROGRAM.match, spans), key=lambda span: not span.startswith(("train", "sample"))):
            command, _, comment = re.sub(r"^(?=(train|sample)\.py)", "python ", span).partition(" #")
            found.setdefault(command.strip(), comment)
            for more in AGAIN.findall(comment):
                found.setdefault(f"{command.strip()} {more.strip()}", comment)
    snippet = re.search(r"(    from sample .*\n(\n|    .*\n)+)", readme)[1]
    found["python - <<'END'\n" + re.sub(r"^    ", "", snippet, flags=re.M) + "END"] = ""
    return found.items()


def made(folder):
    """Everything that the README asks its reader to bring, small."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "runs", "figures", "__pycache__"), dirs_exist_ok=True)
    for style in ("Abstract_Expressionism", "Color_Field_Painting", "Minimalism", "Action_painting"):
        (folder / "wikiart" / style).mkdir(parents=True)
        for k in range(6):
            Image.fromarray(paint(k, k, 128)).save(folder / "wikiart" / style / f"{style}-{k}.png")
    for label, name in enumerate(COLOURS):
        (folder / "DIR" / name).mkdir(parents=True)
        for k in range(6):
            Image.fromarray(paint(k, label, 128)).save(folder / "DIR" / name / f"{k}.png")
    letters = embedded_letters()
    for label, name in enumerate(letters.classes):
        (folder / "PATH" / "Images" / "Images" / name).mkdir(parents=True)
        for font in range(12):
            image = letters.images[26 * font + label, ..., 0]
            Image.fromarray(image).save(folder / "PATH" / "Images" / "Images" / name / f"{font}.png")
    (folder / "fonts").mkdir()
    (folder / "fonts" / "default.ttf").write_bytes(ImageFont.load_default(96).font_bytes)
    for name in ("a", "b"):
        Image.fromarray(paint(0, ord(name) % 8, 300)).save(folder / f"{name}.jpg")
    for name, levels in (("vq-f4", 3), ("vq-f8", 4)):
        torch.manual_seed(0)
        model = VQGAN(32, (1,) * levels, 1, (), 4, Codebook(16, 4))
        (folder / name).mkdir()
        lightning_file(folder / name / "model.ckpt", model.state_dict())
    (folder / "cin").mkdir()
    lightning_file(folder / "cin" / "model.ckpt", published())


def adapted(command, comment):
    """The command with made files for the reader's own, and short unless it is said to take seconds."""
    command = command.replace("--fonts DIR --out PATH", "--fonts fonts --out rendered")
    command = command.replace("-classifier FILE", "-classifier file.pt").replace("--run RUN", "--run runs/ldm")
    command = command.replace("--init model.ckpt", f"--init {'cin' if 'ldm' in command else 'vq-f8'}/model.ckpt")
    if not IS_SHORT.search(command) and not re.match(r" \d+ s", comment):
        short = [flags for words, flags in SHORTER.items() if words in command]
        if "--init" in command:  # the network is given
            short = ["--updates 2 --size 32"]
        if "--resume" in command:
            short = ["--updates 3"]
        command = " ".join([command, *short])
    if "--nnodes 2" in command:  # two machines: here both are this one
        with socket.create_server(("localhost", 0)) as free:
            command = command.replace("HOST:29500", f"localhost:{free.getsockname()[1]}")
        command = command.replace("--nproc-per-node 4", "--nproc-per-node 1")
        command = f"{command} & {command} && wait $!"
    return command.replace("torchrun --nproc", "torchrun --standalone --nproc")


def main():
    failed = 0
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made(folder)
        for command, comment in commands((ROOT / "README.md").read_text()):
            command, start = adapted(command, comment), time.perf_counter()
            how = {
                "cwd": folder,
                "env": os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
                "capture_output": True,
                "text": True,
            }
            done = subprocess.run(["bash", "-c", command], **how)
            verdict = f"FAILED\n{done.stderr[-2000:]}" if done.returncode else "ok"
            print(f"{time.perf_counter() - start:5.0f} s  {command}  {verdict}", flush=True)
            failed += done.returncode != 0
    print(f"{failed} failed" if failed else "all of them end as they should")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
