"""A training run in pictures: `python -m dsv2_jax.plot DIR` draws DIR/metrics.jsonl into metrics.png and expert_load.png there."""

from pathlib import Path

import numpy as np

from dsv2_jax import cli
from dsv2_jax.fields import InputError
from dsv2_jax.metrics import FILE, Record, read

CURVES, HEAT_MAP = "metrics.png", "expert_load.png"
PANELS = {  # what each shows, as label: name in a record
    "loss": {"training": "loss/lm", "held-out data": "loss/eval"},
    "balance losses": {"expert": "loss/expert_balance", "device": "loss/device_balance", "communication": "loss/comm_balance"},
    "dropped token-expert pairs": {"share": "moe/drop_fraction"},
    "gradient norm": {"norm": "grad_norm"},
    "learning rate": {"rate": "lr"},
}


def plot(directory: Path) -> list[Path]:
    """Draws the curves over steps, and how much each expert of each MoE layer was used; returns the PNGs' paths.

    A value that is null is a gap; steps that were skipped are marked. There is no heat map where no record has every expert's load.

    Raises:
        InputError: no metrics there, or matplotlib is not installed.
    """
    records = read(directory / FILE)
    if not records:
        raise InputError(f"{directory / FILE}: empty, expected one step at least")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError("plotting needs matplotlib: pip install matplotlib") from None
    drawn = [curves(records, directory / CURVES)]
    loads = [record for record in records if record.get("moe/load")]
    return drawn + [heat_map(record, directory / HEAT_MAP) for record in loads[-1:]]


def curves(records: list[Record], path: Path) -> Path:
    """One panel a quantity."""
    from matplotlib.figure import Figure

    panels = {
        title: {label: name for label, name in names.items() if any(record.get(name) is not None for record in records)}
        for title, names in PANELS.items()
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        raise InputError(f"{path.with_name(FILE)}: has nothing to draw, expected loss/lm")
    skipped = [record["step"] for record in records if record.get("skipped")]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
    for place, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        for label, name in names.items():
            here = [record for record in records if name in record]
            values = [np.nan if record[name] is None else record[name] for record in here]
            sparse = len(here) < len(records) or len(here) == 1
            axes.plot(
                [record["step"] for record in here], values, "o-" if sparse else "-", linewidth=1, markersize=4, label=label
            )
        if skipped:
            marks = {"transform": axes.get_xaxis_transform(), "color": "tab:red", "clip_on": False, "label": "skipped steps"}
            axes.plot(skipped, np.zeros(len(skipped)), "x", **marks)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(names) > 1 or (skipped and place == 1):
            axes.legend()
    figure.savefig(path, dpi=120)
    return path


def heat_map(record: Record, path: Path) -> Path:
    """Load by layer and expert, over a fair share."""
    from matplotlib.figure import Figure

    load_LE = np.array(record["moe/load"], float)
    layers, experts = load_LE.shape
    share_LE = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1)
    width, height = min(max(6, 0.25 * experts), 14), min(1.7 + 0.3 * layers, 8)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share_LE, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2)
    dead, most = int((load_LE == 0).sum()), share_LE.max()
    axes.set(xlabel="expert", ylabel="MoE layer")
    axes.set_title(
        f"Load of each expert at step {record['step']}\nbusiest {most:.2f} of a fair share, {dead} of {load_LE.size} dead"
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, label="pairs / fair share", extend="max" if most > 2 else "neither")
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    cli.run(lambda directory: print(*plot(Path(directory)), sep="\n"), ["DIR"])
