"""Curves of a training run: `python -m dsv2_jax.plot DIR` draws DIR/metrics.jsonl into DIR/metrics.png."""

from pathlib import Path

from dsv2_jax import cli
from dsv2_jax.fields import InputError
from dsv2_jax.metrics import FILE, read

PANELS = {"loss": "loss/lm", "expert balance loss": "loss/expert_balance", "gradient norm": "grad_norm", "learning rate": "lr"}


def plot(directory: Path) -> Path:
    """Draws one panel a quantity, over steps; returns the PNG's path.

    Raises:
        InputError: no metrics there, or matplotlib is not installed.
    """
    records = read(directory / FILE)
    if not records:
        raise InputError(f"{directory / FILE}: empty, expected one step at least")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plotting needs matplotlib: pip install matplotlib") from None
    panels = {title: name for title, name in PANELS.items() if all(name in record for record in records)}
    if not panels:
        raise InputError(f"{directory / FILE}: has none of {', '.join(PANELS.values())}")
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        axes.plot([record["step"] for record in records], [record[name] for record in records], linewidth=1)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    path = directory / "metrics.png"
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    cli.run(lambda directory: print(plot(Path(directory))), ["DIR"])
