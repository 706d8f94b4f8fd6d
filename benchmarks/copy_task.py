"""Claim: a synthetic gradient at the border lets truncated backpropagation through time copy longer sequences.

The copy task: N random symbols of 4, a delimiter, N blanks; during the blanks the network must return the symbols in
their order. An LSTM of 64 units and a linear head, trained in windows of 4 steps, Adam at 3e-3, gradients clipped at
norm 1, batches of 64 fresh sequences. N begins at 1 and grows by 1 whenever 95 % of the symbols of the last 50 batches
at this N were right: a length is solved then. All are given the same number of windows, that is of updates.

truncated          gradients end at the border
synthetic          an MLP of 128 hidden units estimates what comes, from the state
synthetic, conditioned   it also sees what is still to be returned, and how long until then

Wanted: at least twice the length of truncated. Three seeds, one thread.

    python benchmarks/copy_task.py [--windows 25000] [--seeds 3]
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from _common import RESULTS, save, spread, table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from unrolled.decoupled import MLPSynthesiser, Synthesiser, SyntheticBPTT, ZeroSynthesiser

SYMBOLS, HIDDEN, BATCH, WINDOW, LONGEST = 4, 64, 64, 4, 16
RATE, SOLVED, LOOK_BACK = 3e-3, 0.95, 50
CONDITION = LONGEST * SYMBOLS + LONGEST + 1
METHODS: dict[str, Callable[[], Synthesiser]] = {
    "truncated": ZeroSynthesiser,
    "synthetic": lambda: MLPSynthesiser(2 * HIDDEN, hidden=(128,)),
    "synthetic, conditioned": lambda: MLPSynthesiser(2 * HIDDEN, CONDITION, hidden=(128,)),
}


def sequences(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs (batch, 2 N + 1, symbols + 2), one-hot, and the symbols (batch, N) to return in the last N steps."""
    symbols = torch.randint(SYMBOLS, (BATCH, length), generator=generator)
    inputs = torch.full((BATCH, 2 * length + 1), SYMBOLS + 1)
    inputs[:, :length] = symbols
    inputs[:, length] = SYMBOLS
    return F.one_hot(inputs, SYMBOLS + 2).float(), symbols


def to_come(symbols: Tensor, stop: int) -> Tensor:
    """After `stop` steps: the symbols still to be returned, in their order, and the steps until that begins."""
    length = symbols.shape[1]
    rest = F.one_hot(symbols[:, max(0, stop - length - 1) :], SYMBOLS).float()
    rest = F.pad(rest, (0, 0, 0, LONGEST - rest.shape[1])).flatten(1)
    wait = F.one_hot(torch.tensor(max(0, length + 1 - stop)), LONGEST + 1).float()
    return torch.cat([rest, wait.expand(len(rest), -1)], 1)


def train(method: str, num_windows: int, seed: int, tell: Callable[[int, int], Any] | None = None) -> dict[str, Any]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    synthesiser = METHODS[method]()
    net = SyntheticBPTT(nn.LSTM(SYMBOLS + 2, HIDDEN, batch_first=True), synthesiser)
    head = nn.Linear(HIDDEN, SYMBOLS)
    learning = [*net.net.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam([*learning, *synthesiser.parameters()], lr=RATE)
    length, done, solved = 1, 0, []
    recent: deque[float] = deque(maxlen=LOOK_BACK)
    begin = time.process_time()
    while done < num_windows and length <= LONGEST:
        x, symbols = sequences(length, generator)
        steps, right, border = x.shape[1], 0, None
        for start in range(0, steps, WINDOW):
            stop = min(start + WINDOW, steps)
            condition = to_come(symbols, stop) if synthesiser.condition else None
            out, border = net(x[:, start:stop], border, condition=condition, last=stop == steps)
            first = max(start, length + 1)
            if stop > first:  # a sum over time, a mean over the batch
                logits, wanted = head(out[:, first - start :]), symbols[:, first - length - 1 : stop - length - 1]
                loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / BATCH
                right += int((logits.argmax(-1) == wanted).sum())
            else:  # nothing is to be returned yet, but the gradient from the border flows
                loss = 0 * out.sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            done += 1
        recent.append(right / symbols.numel())
        if len(recent) == LOOK_BACK and sum(recent) / LOOK_BACK >= SOLVED:
            solved.append(done)
            recent.clear()
            length += 1
        if tell is not None:
            tell(done, len(solved))
    seconds = time.process_time() - begin
    return {"method": method, "seed": seed, "length": len(solved), "solved after": solved, "cpu_seconds": seconds}


def judge(runs: list[dict[str, Any]], num_windows: int) -> dict[str, Any]:
    rows = []
    for method in METHODS:
        own = [run for run in runs if run["method"] == method]
        if own:
            cpu = sum(run["cpu_seconds"] for run in own) / len(own)
            rows.append({"method": method, "length solved": spread([run["length"] for run in own]), "CPU s": cpu})
    told = "{median:g} ({min:g} to {max:g})"
    table([[row["method"], told.format(**row["length solved"]), row["CPU s"]] for row in rows], list(rows[0]))
    return {"windows": num_windows, "window": WINDOW, "hidden": HIDDEN, "batch": BATCH, "rows": rows, "runs": runs}


def plot(result: dict[str, Any]) -> None:
    """Length solved against windows seen, one line a seed."""
    from matplotlib.figure import Figure

    colours = dict(zip(METHODS, ("#000000", "#56B4E9", "#0072B2")))  # of Okabe and Ito
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in result["runs"]:
        at, colour = [0, *run["solved after"], result["windows"]], colours[run["method"]]
        label = run["method"] if run["seed"] == 0 else None
        lengths = [*range(len(at) - 1), len(at) - 2]
        axes.step(at, lengths, where="post", color=colour, linewidth=1.8, alpha=0.8, label=label)
    axes.set(xlabel="windows trained on", ylabel="length solved")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(RESULTS / "copy_task.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=25_000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for method in METHODS:
        for seed in range(arguments.seeds):
            with tqdm(total=arguments.windows, desc=f"{method}, seed {seed}") as bar:
                runs.append(train(method, arguments.windows, seed, lambda done, _, bar=bar: bar.update(done - bar.n)))
    RESULTS.mkdir(exist_ok=True)
    result = judge(runs, arguments.windows)
    save("copy_task", result)
    plot(result)


if __name__ == "__main__":
    main()
