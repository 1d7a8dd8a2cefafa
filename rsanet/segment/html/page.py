"""The page of a case: everything that it shows, and the template that shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from rsanet import __version__
from rsanet.segment.html.charts import draw_attention, histogram
from rsanet.segment.html.followup import FATES, FollowUp, follow
from rsanet.segment.html.lesions import STATUS, Lesion, list_lesions
from rsanet.segment.html.mosaics import draw_mosaics, draw_projections, name_layers
from rsanet.segment.html.pictures import Frame, Picture
from rsanet.segment.html.regions import REGIONS, Regions, tell_regions
from rsanet.segment.html.scan import Scan
from rsanet.segment.metrics import CaseMetrics, Protocol, evaluate_case
from rsanet.segment.report import COLOURS
from rsanet.segment.words import sizes

if TYPE_CHECKING:
    from jinja2 import Environment

Array = np.ndarray

RESEARCH = "Research only, not a medical device."
SIMULATED = "Simulated data: no clinical meaning."
GREEN, QUIET = "#009E73", "#C8C8C8"

# Colour, and dashes of SVG: who cannot tell the colours apart has the lines.
STYLES = {
    "predicted": (COLOURS["hit"], ""),
    "hit": (COLOURS["hit"], ""),
    "false": (COLOURS["false"], "4 2"),
    "missed": (COLOURS["missed"], "8 3"),
    "uncounted": (QUIET, "2 2"),
    "reference": (COLOURS["reference"], "1 2.5"),
    "new": (COLOURS["false"], ""),
    "enlarged": (COLOURS["missed"], "8 3"),
    "vanished": (COLOURS["reference"], "4 2"),
    "shrunk": (COLOURS["hit"], "7 2 1 2"),
    "stable": (GREEN, ""),
    "tiny": (QUIET, "2 2"),
    "unseen": (QUIET, "2 2"),
}

# What a page says of how a mask was made, by the keys of the mask's JSON.
FACTS = {
    "Sources": "images",
    "Models": "models",
    "Contrasts": "contrasts",
    "Threshold": "threshold",
    "MinimumLesionVolume": "smallest lesion kept (mm³)",
    "Window": "window (voxels along z, y, x)",
    "MirrorImages": "mirror images averaged",
    "Backend": "attention backend",
    "Device": "device",
    "Precision": "precision",
    "VoxelSize": "voxel size (mm)",
    "Seconds": "seconds",
    "GeneratedBy": "made by",
    "Versions": "versions",
}
ROW_FACTS = {"seconds": "seconds", "backend": "attention backend", "window": "window (voxels)", "made_by": "made by"}


@dataclass(frozen=True, eq=False)
class Page:
    """A case, ready for its page, and what the cohort's page says of it.

    Attributes:
        name: of the case.
        file: name of the page.
        load_mm3: predicted lesion load.
        lesions: of prediction and reference.
        metrics: how the two agree, if there are two.
        follow_up: the comparison with the session before, if there is one.
        thumbnail: the axial slice with the most lesions.
        html: the page.
        warnings: what `rsanet predict` found doubtful, a sentence each.
    """

    name: str
    file: str
    load_mm3: float
    lesions: list[Lesion]
    metrics: CaseMetrics | None
    follow_up: FollowUp | None
    thumbnail: Picture
    html: str
    warnings: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of predicted lesions."""
        return sum(not lesion.id.startswith("R") for lesion in self.lesions)


def page_file(case: str) -> str:
    """Name of a case's page; ``index.html`` is the cohort's."""
    return f"case-{case}.html" if case.lower() == "index" else f"{case}.html"


def link(file: str) -> str:
    """A file beside the page as a relative address, whatever its name holds."""
    return f"./{quote(file)}"


def make_page(
    scan: Scan,
    protocol: Protocol,
    *,
    before: Scan | None = None,
    maps: Mapping[str, Array] | None = None,
    row: Mapping[str, str] | None = None,
    simulated: bool = False,
    remarks: Sequence[str] = (),
) -> Page:
    """Everything about a case, and its page.

    Args:
        scan: the case.
        protocol: what a lesion is, and when it is found.
        before: the session before, if there is one.
        maps: attention maps (S, S) by axis, if they are to be shown.
        row: the case's row of ``predictions.csv``, if there is one.
        simulated: whether to say that the data are simulated.
        remarks: sentences to show with those of the scan.
    """
    lesions = list_lesions(scan, protocol)
    frame = Frame.around(scan.image, scan.spacing, [lesion.voxels for lesion in lesions])
    regions = tell_regions(scan.images, scan.affine, [lesion.voxels for lesion in lesions])
    mosaics = draw_mosaics(scan, lesions, frame)
    metrics = None
    if scan.reference is not None:
        metrics = evaluate_case(scan.prediction, scan.reference, scan.affine, protocol, subject=scan.name)
    follow_up = follow(before, scan, lesions, frame, protocol) if before else None
    thumbnail = max(mosaics[0].pictures, key=lambda picture: len(picture.outlines))
    page = Page(
        scan.name,
        page_file(scan.name),
        int(np.count_nonzero(scan.prediction)) * scan.voxel_mm3,
        lesions,
        metrics,
        follow_up,
        thumbnail,
        "",
        list_warnings(scan, row or {}),
    )
    content = {
        "page": page,
        "scan": scan,
        "regions": regions,
        "region_words": _count_regions(lesions, regions),
        "mosaics": mosaics,
        "projections": draw_projections(scan, lesions, frame),
        "needed": sum(lesion.status != "reference" for lesion in lesions),
        "layers": name_layers(lesions, STATUS),
        "bars": histogram([(one.status, one.volume_mm3) for one in lesions if one.status != "reference"], list(STATUS)),
        "fates": [(key, words, follow_up.counts[key]) for key, words in FATES.items() if follow_up.counts[key]]
        if follow_up
        else [],
        "before_file": page_file(before.name) if before else "",
        "maps": [draw_attention(axis, weights) for axis, weights in (maps or {}).items()],
        "facts": list_facts(scan, row or {}),
        "remarks": [*(f"Warning of the prediction: {words}" for words in page.warnings), *scan.notes, *remarks],
        "protocol": protocol.describe(),
        "simulated": simulated,
    }
    html = render("case.html", **content)
    return replace(page, html=html)


def _count_regions(lesions: Sequence[Lesion], regions: Regions) -> str:
    """How many predicted lesions are in which region, in a sentence; none where no region is known."""
    names = [name for lesion, name in zip(lesions, regions.names, strict=True) if not lesion.id.startswith("R")]
    if not any(names):
        return ""
    counts = [f"{names.count(name)} {name}" for name in REGIONS]
    counts += [f"{names.count('')} of no known region"] if "" in names else []
    return f"Predicted lesions by region: {', '.join(counts)}."


def list_facts(scan: Scan, row: Mapping[str, str]) -> list[tuple[str, str]]:
    """What is known of how the mask was made: by its JSON, else by the table of the cohort."""
    facts = [("grid", f"{sizes(scan.file_shape)} voxels of {' × '.join(f'{s:.3g}' for s in scan.spacing)} mm")]
    facts += [(words, text) for key, words in FACTS.items() if (text := _plain(scan.sidecar.get(key)))]
    if len(facts) == 1:
        facts += [(words, row[key]) for key, words in ROW_FACTS.items() if row.get(key)]
    return facts


def list_warnings(scan: Scan, row: Mapping[str, str]) -> tuple[str, ...]:
    """What the prediction warned of: by the mask's JSON, else by the table of the cohort."""
    told = scan.sidecar.get("Warnings")
    told = told if isinstance(told, list) else [row.get("warnings")]
    return tuple(filter(None, map(_plain, told)))


def _plain(value: Any) -> str:
    """A value of a JSON file in words, whatever it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict) and value.keys() == {"Name", "Version"}:
        return " ".join(map(_plain, value.values()))
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        nested = any(isinstance(entry, (list, dict)) for entry in value)
        return ("; " if nested else ", ").join(_plain(entry) for entry in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)


@lru_cache(maxsize=1)
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("rsanet.segment.html"),
        autoescape=True,  # names of files and words of JSON files are anybody's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"link": link, "ml": lambda mm3: f"{mm3 / 1000:.2f}", "page_file": page_file}
    environment.globals |= {
        "version": __version__,
        "research": RESEARCH,
        "simulated_words": SIMULATED,
        "styles": STYLES,
        "status_words": STATUS,
        "fate_words": FATES,
    }
    return environment


def render(template: str, **content: Any) -> str:
    """The page that a template makes."""
    return _environment().get_template(template).render(**content)
