"""Claim: a synthetic gradient at the border lets truncated backpropagation through time copy longer sequences.

The copy task: N random symbols of 4, a delimiter, N blanks; during the blanks the network must return the symbols in
their order. An LSTM of 128 units whose forget gates begin with a bias of 1, and a linear head, trained in windows of T
steps, Adam, gradients clipped at norm 1, batches of 64 fresh sequences. N begins at 1 and grows by 1 whenever 95 % of
the symbols of the last 50 batches at this N were right: a length is solved then. All are given the same number of
windows, that is of updates. All was chosen on seed 100, and there truncated windows did best at 5e-4.

truncated          gradients end at the border; Adam at 5e-4, 1e-3 and 2e-3
synthetic          an MLP of 128 hidden units estimates what comes, from the state (one seed)
synthetic, conditioned   an affine map that also sees which symbol is due in each of the steps to come

Synthesisers learn at 1e-3 beside a network at 2e-3.

Wanted: at least twice the length of truncated. Three seeds, one thread.

    python benchmarks/copy_task.py [--steps 2] [--windows 24000] [--seeds 3]
    python benchmarks/copy_task.py --windows 40000 --only "truncated, 5e-4" "synthetic, conditioned"

`--only` trains some methods, and takes everything else from the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from _common import RESULTS, save, spread, table
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from unrolled.decoupled import LinearSynthesiser, MLPSynthesiser, Synthesiser, SyntheticBPTT, ZeroSynthesiser

SYMBOLS, HIDDEN, BATCH, LONGEST = 4, 128, 64, 24
FORGET, CLIP, SOLVED, LOOK_BACK = 1.0, 1.0, 0.95, 50
AHEAD = 2 * LONGEST  # steps that the condition looks ahead
BESIDE = 1e-3  # rate of the synthesisers
METHODS: dict[str, tuple[float, Callable[[], Synthesiser]]] = {  # rate of the network, synthesiser
    "truncated, 5e-4": (5e-4, ZeroSynthesiser),
    "truncated, 1e-3": (1e-3, ZeroSynthesiser),
    "truncated, 2e-3": (2e-3, ZeroSynthesiser),
    "synthetic": (2e-3, lambda: MLPSynthesiser(2 * HIDDEN, hidden=(128,))),
    "synthetic, conditioned": (2e-3, lambda: LinearSynthesiser(2 * HIDDEN, AHEAD * SYMBOLS)),
}
ONCE = ("synthetic",)  # with one seed


def sequences(length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs (batch, 2 N + 1, symbols + 2), one-hot, and the symbols (batch, N) to return in the last N steps."""
    symbols = torch.randint(SYMBOLS, (BATCH, length), generator=generator)
    inputs = torch.full((BATCH, 2 * length + 1), SYMBOLS + 1)
    inputs[:, :length] = symbols
    inputs[:, length] = SYMBOLS
    return F.one_hot(inputs, SYMBOLS + 2).float(), symbols


def to_come(symbols: Tensor, stop: int) -> Tensor:
    """After `stop` steps: for each of the steps ahead the symbol that is due, one-hot; zeros where none is."""
    due = F.pad(F.one_hot(symbols, SYMBOLS).float(), (0, 0, symbols.shape[1] + 1, AHEAD))
    return due[:, stop : stop + AHEAD].flatten(1)


def build(method: str) -> tuple[SyntheticBPTT, nn.Linear]:
    lstm = nn.LSTM(SYMBOLS + 2, HIDDEN, batch_first=True)
    with torch.no_grad():
        for bias, value in ((lstm.bias_ih_l0, FORGET), (lstm.bias_hh_l0, 0.0)):
            bias[HIDDEN : 2 * HIDDEN] = value
    return SyntheticBPTT(lstm, METHODS[method][1]()), nn.Linear(HIDDEN, SYMBOLS)


def train(
    method: str, window: int, num_windows: int, seed: int, tell: Callable[[int], Any] | None = None
) -> dict[str, Any]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net, head = build(method)
    learning = [*net.net.parameters(), *head.parameters()]
    groups = [
        {"params": learning, "lr": METHODS[method][0]},
        {"params": list(net.synthesiser.parameters()), "lr": BESIDE},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
    length, done, solved = 1, 0, []
    accuracy: list[tuple[int, int, float]] = []  # windows, length, symbols right
    recent: deque[float] = deque(maxlen=LOOK_BACK)
    begin = time.process_time()
    while done < num_windows and length <= LONGEST:
        x, symbols = sequences(length, generator)
        steps, right, border = x.shape[1], 0, None
        for start in range(0, steps, window):
            stop = min(start + window, steps)
            condition = to_come(symbols, stop) if net.synthesiser.condition else None
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
            nn.utils.clip_grad_norm_(learning, CLIP)
            optimizer.step()
            done += 1
            if done % 1000 == 0:
                accuracy.append((done, length, sum(recent) / max(1, len(recent))))
        recent.append(right / symbols.numel())
        if len(recent) == LOOK_BACK and sum(recent) / LOOK_BACK >= SOLVED:
            solved.append(done)
            recent.clear()
            length += 1
        if tell is not None:
            tell(done)
    seconds = time.process_time() - begin
    return {
        "method": method,
        "window": window,
        "windows": num_windows,
        "seed": seed,
        "length": len(solved),
        "solved after": solved,
        "symbols right at a length": accuracy,
        "cpu_seconds": seconds,
    }


def judge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    kinds = sorted({(run["window"], run["windows"]) for run in runs})
    for (window, num_windows), method in itertools.product(kinds, METHODS):
        own = [run for run in runs if (run["method"], run["window"], run["windows"]) == (method, window, num_windows)]
        if own:
            cpu = sum(run["cpu_seconds"] for run in own) / len(own)
            lengths = spread([run["length"] for run in own])
            row = {"T": window, "windows": num_windows, "method": method, "length solved": lengths, "CPU s": cpu}
            rows.append(row)
    told = "{median:g} ({min:g} to {max:g})"
    table([[told.format(**v) if isinstance(v, dict) else v for v in row.values()] for row in rows], list(rows[0]))
    rates = {method: rate for method, (rate, _) in METHODS.items()}
    return {
        "hidden": HIDDEN,
        "batch": BATCH,
        "rates": rates,
        "beside": BESIDE,
        "rows": rows,
        "runs": runs,
    }


def plot(result: dict[str, Any]) -> None:
    """Length solved against windows seen, one line a seed, a panel for each T."""
    from matplotlib.figure import Figure

    colours = dict(zip(METHODS, ("#000000", "#D55E00", "#999999", "#56B4E9", "#0072B2")))  # of Okabe and Ito
    sizes = sorted({run["window"] for run in result["runs"]})
    figure = Figure(figsize=(2.5 + 4.5 * len(sizes), 4), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0], sizes):
        # The longest run of a seed only: the shorter ones are its beginning.
        of_size = sorted((run for run in result["runs"] if run["window"] == size), key=lambda run: run["windows"])
        named: set[str] = set()
        for run in {(run["method"], run["seed"]): run for run in of_size}.values():
            at, colour = [0, *run["solved after"], run["windows"]], colours[run["method"]]
            label = run["method"] if run["seed"] == 0 and run["method"] not in named else None
            named.add(run["method"])
            lengths = [*range(len(at) - 1), len(at) - 2]
            axes.step(at, lengths, where="post", color=colour, linewidth=1.8, alpha=0.8, label=label)
        axes.set(xlabel="windows trained on", title=f"windows of {size} steps")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("length solved")
    figure.axes[0].legend(frameon=False)
    figure.savefig(RESULTS / "copy_task.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[2], help="in a window, one or several")
    parser.add_argument("--windows", type=int, default=24_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(exist_ok=True)
    partial = RESULTS / "copy_partial.json"
    runs: list[dict[str, Any]] = []
    if len(arguments.only) < len(METHODS):
        before = json.loads((RESULTS / "copy_task.json").read_text())["runs"]
        new = set(itertools.product(arguments.only, [arguments.windows], arguments.steps))
        runs += [run for run in before if (run["method"], run["windows"], run["window"]) not in new]
    # Seed by seed, so that an interrupted run leaves all methods with equally many.
    for window, seed, method in itertools.product(arguments.steps, range(arguments.seeds), arguments.only):
        if seed > 0 and method in ONCE:
            continue
        with tqdm(total=arguments.windows, desc=f"{method}, T = {window}, seed {seed}") as bar:
            runs.append(train(method, window, arguments.windows, seed, lambda done, bar=bar: bar.update(done - bar.n)))
        partial.write_text(json.dumps(runs))
    partial.unlink()
    result = judge(runs)
    save("copy_task", result)
    plot(result)


if __name__ == "__main__":
    main()
