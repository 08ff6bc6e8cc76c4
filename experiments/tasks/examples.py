"""What the tasks look like: `python -m experiments.tasks.examples examples.png`."""

import argparse

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.errors import UserError, check_writable
from experiments.tasks import arrow
from experiments.tasks.parity import ParityBatches
from experiments.tasks.rays import RayBatches

_COUNT = 16


def draw(seed: int, png: str) -> None:
  """Draws 16 examples each of parity, rays, and arrow pointing in pixels and in tokens."""
  figure = Figure(figsize=(16, 12), dpi=100, layout="constrained")
  FigureCanvasAgg(figure)
  parts = figure.subfigures(2, 2)
  _rays(parts[0, 0], RayBatches(_COUNT, 8, seed)[0])
  _tokens(parts[0, 1], arrow.ArrowTokenBatches(_COUNT, 8, seed)[0])
  _pictures(parts[1, 0], arrow.ArrowBatches(_COUNT, 192, seed, examples=0)[0])
  _parity(parts[1, 1], ParityBatches(_COUNT, 32, seed)[0])
  figure.savefig(png, format="png", facecolor="white")


def _rays(part, batch) -> None:
  part.suptitle("rays: which cells are on it?")
  for axes, image, targets in zip(_grid(part), batch["images"], batch["targets"]):
    axes.imshow(targets, cmap="Greys", vmin=0, vmax=2)
    _arrow(axes, image, arrow=0, cos=1, offset=3)


def _tokens(part, batch) -> None:
  part.suptitle("arrow pointing, tokens")
  for axes, image, target in zip(_grid(part), batch["images"], batch["targets"]):
    axes.imshow(np.zeros(image.shape[:2]), cmap="Greys", vmin=0, vmax=2)
    _arrow(axes, image, arrow=0, cos=2, offset=5)
    y, x = np.argwhere(image[..., 1])[0]
    angle = np.linspace(0, 2 * np.pi, 50)
    radius, right, down = image[y, x, 4:]
    axes.plot(x + right + radius * np.cos(angle), y + down + radius * np.sin(angle), "k")
    axes.set_title(int(target), fontsize=9)


def _pictures(part, batch) -> None:
  part.suptitle("arrow pointing, 192 x 192")
  for axes, image, target in zip(_grid(part), batch["images"], batch["targets"]):
    axes.imshow(np.clip(image * np.array(arrow.DEVIATION) + np.array(arrow.MEAN), 0, 1))
    axes.set_title(int(target), fontsize=9)


def _parity(part, batch) -> None:
  part.suptitle("parity: bits, and below them the parity so far")
  axes = part.subplots()
  rows = np.stack([batch["inputs"], batch["targets"], np.full_like(batch["inputs"], -1)], axis=1)
  axes.imshow(
    np.ma.masked_less(rows.reshape(3 * _COUNT, -1), 0), cmap="Greys", vmin=-0.3, aspect="auto"
  )
  axes.set_axis_off()


def _grid(part):
  places = part.subplots(4, 4).ravel()
  for axes in places:
    axes.set_xticks([])
    axes.set_yticks([])
  return places


def _arrow(axes, image, *, arrow: int, cos: int, offset: int) -> None:
  y, x = np.argwhere(image[..., arrow])[0]
  start = np.array([x, y]) + image[y, x, offset : offset + 2]
  # One cell long.
  size = {"scale_units": "xy", "scale": 1, "units": "xy", "width": 0.15}
  axes.quiver(*start, *image[y, x, cos : cos + 2], angles="xy", color="#cc6633", **size)


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("png", help="the file to write")
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args(argv)
  try:
    check_writable("png", arguments.png)
    draw(arguments.seed, arguments.png)
  except UserError as error:
    parser.exit(error.status, f"error: {error}\n")
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
