"""The tables in ``benchmarks/results``: one row for each thing that was measured, the latest measurement of it."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).parent / "results"

# What stands under "status". Only a measured row has times.
MEASURED, WRONG, FAILED = "measured", "wrong", "failed"
OUT_OF_MEMORY, UNUSABLE, SKIPPED = "out of memory", "unusable", "skipped"

# What every table says of where and when a row was made.
WHERE = {
    "device": "the processor and its widest instruction set, or the GPU",
    "threads": "that torch uses on the CPU",
    "driver": "version of the GPU's driver",
    "torch": "version",
    "triton": "version",
    "cuda": "version that torch was built for",
    "commit": "of this repository",
    "date": "of the run",
    "load_percent": "processor time that others took just before the case, of all cores",
    "drift_percent": "by how much the matrix product's speed differed before and after the case",
}
BLOCK = WHERE | {
    "case": "name of the volume's shape, or of a sweep and its place in it",
    "shape": "N x C x D x H x W",
    "axes": "spatial dims of the steps, in order: 2 axial, 3 coronal, 4 sagittal",
    "dtype": "of volumes and weights; tf32 is float32 with TensorFloat-32 allowed",
    "format": "memory format of the volume",
    "mode": "forward, backward and their sum, full: with all gradients; no_grad: forward without",
    "provider": "who computes it: see benchmarks/README.md",
    "status": f"{MEASURED}, or why there is no time: {WRONG}, {FAILED}, {OUT_OF_MEMORY}, {UNUSABLE}, {SKIPPED}",
    "note": "the reason in a sentence",
    "samples": "passes that were timed",
    "median_ms": "of one pass",
    "low_ms": "lower quartile",
    "high_ms": "upper quartile",
    "graph_ms": "of one pass in a CUDA graph, median; only where the inputs fit the L2 cache",
    "host_ms": "what a call costs besides the work: on a GPU until it returns, on a CPU with 2 x 2 x 2 voxels",
    "peak_extra_mib": "largest use of memory above that of the inputs",
    "saved_mib": "what autograd keeps for backward, the input included, the weights not",
    "gflop": "10^9 operations that the pass has to do at least, a multiply-add being two",
    "gbyte": "10^9 bytes that the pass has to read and write at least",
    "gflop_per_s": "gflop over the median, or over graph_ms where there is one",
    "gb_per_s": "gbyte over the same",
    "floor_ms": "the least time that the hardware allows: see benchmarks/README.md",
    "percent_of_floor": "floor_ms over the median, or over graph_ms where there is one, times 100",
    "matrix_gflop_per_s": "of a large matrix product of this dtype in this run",
    "copy_gb_per_s": "of a large copy in this run, bytes read and written",
    "error": "largest relative error of output and gradients against float64",
    "error_on": "shape of the part of the volume on which the error was found, if not the whole",
}
BLOCK_KEY = ("device", "threads", "case", "shape", "axes", "dtype", "format", "mode", "provider")

Row = dict[str, str]


class Table(NamedTuple):
    """A CSV file whose rows are told apart by some of their columns."""

    path: Path
    columns: Sequence[str]
    key: Sequence[str]

    def read(self) -> list[Row]:
        """All rows, or none where there is no file yet."""
        return parse(self.path.read_text()) if self.path.exists() else []

    def put(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Adds rows in the place of those with the same key; the file is whole at any moment."""
        kept = {self.identity(row): row for row in self.read()}
        for row in rows:
            unknown = row.keys() - set(self.columns)
            if unknown:
                raise ValueError(f"the table {self.path.name} has no column {', '.join(sorted(unknown))}")
            full = {column: "" if row.get(column) is None else str(row[column]) for column in self.columns}
            kept[self.identity(full)] = full
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, extrasaction="ignore", restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text(text.getvalue())
        os.replace(beside, self.path)

    def identity(self, row: Mapping[str, str]) -> tuple[str, ...]:
        """What tells a row from all others."""
        return tuple(row.get(column, "") for column in self.key)


def parse(text: str) -> list[Row]:
    """The rows of a table's text."""
    return list(csv.DictReader(io.StringIO(text)))


def block_table(device: str, folder: Path = RESULTS) -> Table:
    """The table of the block's measurements on a device."""
    return Table(folder / f"{file_name(device)}.csv", tuple(BLOCK), BLOCK_KEY)


def file_name(device: str) -> str:
    """A device's name in letters, digits and hyphens."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
