"""How assets/letters_classifier.pt was made: python assets/make_letters_classifier.py FILE [EPOCHS]

It trains on the letters that come with the project, for minutes on a CPU, and writes FILE.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import UserError, open_set, run_program, whole_file  # noqa: E402
from fid import letters_classifier  # noqa: E402


def train_letters_classifier(path, epochs=12, batch=128, seed=0):
    """Train on the training fonts: turned, sheared, scaled and shifted at random.

    Saves the weights in half precision. Returns the accuracy on the validation fonts.
    """
    letters = open_set("letters")
    train, validation = letters.split()
    torch.manual_seed(seed)
    network = letters_classifier()
    updates = epochs * len(train) // batch
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, updates)
    order = torch.cat([torch.randperm(len(train)) for _ in range(epochs)]).numpy()
    for n in tqdm(range(updates), "letters classifier", unit="update", disable=None):
        x, y = letters.batch(train[order[n * batch : (n + 1) * batch]])
        A = torch.eye(2, 3) + torch.randn(batch, 2, 3) * 0.12
        where = F.affine_grid(A, (batch, 1, 32, 32), align_corners=False)
        x = F.grid_sample(x[:, :1] + 1, where, align_corners=False) - 1
        F.cross_entropy(network(x), y, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    network.eval()
    with whole_file(path) as temporary:
        torch.save(network.half().state_dict(), temporary)
    x, y = letters.batch(validation)
    with torch.no_grad():
        return (network.float()(x[:, :1]).argmax(1) == y).double().mean().item()


def main():
    if len(sys.argv) < 2:
        raise UserError("expected the name of the file to write")
    accuracy = train_letters_classifier(sys.argv[1], *map(int, sys.argv[2:3]))
    print(f"{sys.argv[1]}: accuracy {accuracy:.1%} on the letters of the validation fonts")


if __name__ == "__main__":
    run_program(main)
