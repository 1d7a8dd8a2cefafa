"""A case of a data set: the images and masks that were found for a subject, or for one session."""

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rsanet.segment.raters import RULES, RatersMask, files_of, find_rater
from rsanet.segment.volumes import MaskSource, stem

CONSENSUS = "consensus"  # a mask with this in its name is what the raters agreed on, and no further rater's


@dataclass(frozen=True)
class Case:
    """One subject, or one session: an image per contrast, in channel order, and a lesion mask where there is one.

    A contrast with several images is in ``several`` instead, and so are several masks, as ``mask``: which of them is
    meant is not ours to say.

    Attributes:
        id: name of the case; files for it are named by it.
        images: files by contrast.
        mask: the lesion mask, a file or what is made of several.
        several: files of which one is meant.
        raters: every lesion mask, by the name that tells it from the others.
        subject: whose session it is, where the name does not tell.
        place: for BIDS, the folder of its files below that of the data set or of its derivatives.
    """

    id: str
    images: dict[str, Path] = field(default_factory=dict)
    mask: Path | MaskSource | None = None
    several: dict[str, list[Path]] = field(default_factory=dict)
    raters: dict[str, Path | MaskSource] = field(default_factory=dict)
    subject: str = ""
    place: str = ""

    def files(self) -> Iterator[Path]:
        """All its files, those of which one is meant included."""
        masks = [self.mask, *self.raters.values()]
        yield from self.images.values()
        yield from (path for paths in self.several.values() for each in paths for path in files_of(each))
        yield from (path for mask in masks for path in files_of(mask))

    def pick(self, contrasts: Sequence[str]) -> dict[str, Path]:
        """The images of some contrasts, in their order, or an error that says which one is missing or given twice."""
        for name in contrasts:
            if name in self.several:
                files = ", ".join(path.name for path in self.several[name])
                raise ValueError(
                    f"{self.id} has several {name} images ({files}): leave one, or list the files in a .csv."
                )
        missing = [name for name in contrasts if name not in self.images]
        if missing or not contrasts:
            raise ValueError(f"{self.id} has no {' and no '.join(missing) or 'images'}.")
        files: dict[Path, str] = {}
        for name in contrasts:
            path = self.images[name]
            if isinstance(path, Path) and (other := files.setdefault(path.resolve(), name)) != name:
                raise ValueError(f"{self.id} has {path} as {other} and as {name}: give each contrast its own file.")
        return {name: self.images[name] for name in contrasts}

    def pick_mask(self) -> Path | MaskSource | None:
        """The lesion mask, None where there is none, or an error where there are several, or not the rater's."""
        if "mask" in self.several:
            files = ", ".join(map(str, self.several["mask"]))
            raise ValueError(
                f"{self.id} has several lesion masks ({files}): give --raters {next(iter(self.raters))}, or another "
                f"of them, or {', '.join(RULES)}; or leave one."
            )
        if self.mask is None and self.raters:
            raise ValueError(f"{self.id} has no mask of that rater: it has {', '.join(self.raters)}.")
        return self.mask

    def with_raters(self, chosen: str) -> "Case":
        """The same case with the mask of one rater, by its name, or what a rule makes of all of them.

        A consensus is made of the raters' masks, and has no vote beside them. Without a mask of that rater, the case
        has none.
        """
        several = {name: paths for name, paths in self.several.items() if name != "mask"}
        if chosen not in RULES:
            name = find_rater(chosen, list(self.raters))
            return replace(self, mask=self.raters[name] if name else None, several=several)
        voters = {name: mask for name, mask in self.raters.items() if CONSENSUS not in name.lower()} or self.raters
        if len(voters) < 2:
            return replace(self, mask=next(iter(voters.values()), None), several=several)
        return replace(self, mask=RatersMask(chosen, voters), several=several)


def make_case(
    name: str,
    images: Sequence[tuple[str, Path]],
    masks: Sequence[Path] | Mapping[str, Path | MaskSource],
    *,
    consensus: bool = False,
    subject: str = "",
    place: str = "",
) -> Case:
    """A case of all the images and masks found for it. Of several masks, a consensus is the one that is meant.

    Args:
        name: of the case.
        images: contrasts and files.
        masks: files; or, where the layout says who drew them, by rater.
        consensus: whether of masks by rater the first is the one that is meant.
        subject: see `Case`.
        place: see `Case`.
    """
    found: dict[str, list[Path]] = {}
    for contrast, path in images:
        found.setdefault(contrast, []).append(path)
    if isinstance(masks, Mapping):
        raters = dict(masks)
        agreed = [mask for rater, mask in raters.items() if CONSENSUS in f"{rater} {mask}".lower()]
        meant = list(raters.values())[:1] if consensus else agreed or list(raters.values())
    else:
        meant = list(masks)
        for word in (CONSENSUS, "lesion"):
            meant = [path for path in meant if word in path.name.lower()] or meant
        drawn = [path for path in masks if "lesion" in path.name.lower()] or masks
        raters = name_raters(name, [*drawn, *(path for path in meant if path not in drawn)])
    if meant:
        found["mask"] = meant
    single = {key: paths[0] for key, paths in found.items() if len(paths) == 1}
    several = {key: paths for key, paths in found.items() if len(paths) > 1}
    # macOS stores letters and their accents apart, where lists and other systems have them as one.
    return Case(
        unicodedata.normalize("NFC", name),
        {key: path for key, path in single.items() if key != "mask"},
        single.get("mask"),
        several,
        raters,
        subject,
        place,
    )


def name_raters(case: str, masks: Sequence[Path]) -> dict[str, Path]:
    """Masks of a case by what tells them apart: what follows the case in their names, or else their folders."""
    names = [stem(path).removeprefix(case).strip("_-. ") or "mask" for path in masks]
    if len(set(names)) < len(names):
        common = os.path.commonpath([path.parent for path in masks])
        names = [next(iter(path.parent.relative_to(common).parts), path.name) for path in masks]
    if len(set(names)) < len(names):
        names = [str(path) for path in masks]
    return dict(zip(names, masks, strict=True))
