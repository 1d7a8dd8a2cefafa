"""The signal of tissue in each MR contrast."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Contrast:
    """Mean signal of each tissue in one MR contrast, as a fraction of its brightest tissue.

    Attributes:
        csf: cerebrospinal fluid.
        grey: grey matter.
        white: white matter.
        lesion: a typical lesion.
        hole: the most destroyed lesion tissue (a T1 black hole).
        detail: how much of the template's own contrast within a tissue to keep, and its sign.
        rim: brightness added to the normal rim of the ventricles.
        gain: signal of a fraction of 1, in scanner units.
    """

    csf: float
    grey: float
    white: float
    lesion: float
    hole: float
    detail: float
    rim: float
    gain: float


SIGNALS = {
    "FLAIR": Contrast(csf=0.10, grey=0.66, white=0.53, lesion=0.92, hole=0.84, detail=-0.45, rim=0.26, gain=620),
    "T1w": Contrast(csf=0.20, grey=0.60, white=0.90, lesion=0.66, hole=0.38, detail=1.0, rim=-0.04, gain=540),
    "T2w": Contrast(csf=1.00, grey=0.53, white=0.36, lesion=0.70, hole=0.82, detail=-0.55, rim=0.06, gain=900),
    "PDw": Contrast(csf=0.74, grey=0.82, white=0.68, lesion=0.95, hole=0.98, detail=-0.40, rim=0.06, gain=700),
}
