"""What manifests of earlier formats say, in the words of the present one (`format`).

* Format 2 saw a tensor as a matrix: a slice was a range of a rectangle, `rows` by `columns`, and was listed once for
  each kind; all tensors had the same kinds. `scalars` held what `states` holds now, but for step and samples.
* Format 1 knew no rectangles: a slice was a range of the whole tensor. It stored vocabulary tables with their padding.
"""

from typing import Any

_VOCABULARY = ("embedding.tokens.weight", "head.weight")


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """The content of a manifest of format 1 or 2 as one of format 3."""
    progress = {"step": values["step"], "consumed_samples": values["consumed_samples"], **values["scalars"]["progress"]}
    states = {
        "progress": progress,
        "optimizer": values["scalars"]["optimizer"],
        "order": values["scalars"].get("order") or {},
    }
    tensors = {name: _tensor(tensor, values["scalars"]["kinds"]) for name, tensor in values["tensors"].items()}
    if values["format"] == 1:
        for name in tensors.keys() & set(_VOCABULARY):
            tensors[name]["shape"][0] = values["config"]["model"]["vocab_size"]
    kept = {key: value for key, value in values.items() if key not in ("format", "consumed_samples", "scalars")}
    return {**kept, "states": states, "tensors": tensors}


def _tensor(tensor: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    shape = list(tensor["shape"])
    return {"shape": shape, "kinds": kinds, "slices": [_slice(piece, shape) for piece in tensor["slices"]["weight"]]}


def _slice(piece: dict[str, Any], shape: list[int]) -> dict[str, Any]:
    """A slice with its box; there were vectors, seen as one column, and matrices."""
    rows, columns = piece.get("rows", [0, shape[0]]), piece.get("columns", [0, shape[-1]])
    ranges = [rows, columns][: len(shape)]
    return {
        "file": piece["file"],
        "offsets": [start for start, _ in ranges],
        "sizes": [stop - start for start, stop in ranges],
        "start": piece["start"],
        "stop": piece["stop"],
    }
