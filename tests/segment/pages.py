"""What tests of the HTML report share: a reader of pages, and scans and masks with known lesions."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from rsanet.segment.html.scan import Scan

SHAPE = (30, 40, 20)


class Elements(HTMLParser):
    """The elements of a page, and its words outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.found, self.words, self.rows, self.cell = [], [], [], None
        self.inside = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = []

    def handle_endtag(self, tag):
        if tag in self.inside:
            while self.inside.pop() != tag:
                pass
        if tag in ("td", "th"):
            self.rows[-1].append("".join(self.cell).strip())
            self.cell = None

    def handle_data(self, data):
        if not {"script", "style"} & set(self.inside):
            self.words.append(data)
            if self.cell is not None:
                self.cell.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.found if name == tag]

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def read(path):
    return Elements(path.read_text(encoding="utf-8"))


def scan(prediction, reference=None, affine=None, probability=None, image=None, name="case"):
    """A scan of a head that fills most of the volume."""
    affine = np.diag([2.0, 1.5, 4.0, 1.0]) if affine is None else affine
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in prediction.shape], indexing="ij"))
    image = np.where((grid**2).sum(0) < 0.9, 100.0, 0.0).astype(np.float32) if image is None else image
    return Scan(name, "FLAIR", {"FLAIR": image}, prediction, reference, probability, affine, affine, prediction.shape)


def masks():
    """A prediction with a hit, a false lesion and one of a voxel, and a reference with a missed lesion."""
    prediction, reference = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    prediction[8:12, 10:14, 8:10] = reference[9:12, 10:15, 8:10] = True
    prediction[20:23, 25:27, 12] = True
    prediction[15, 20, 5] = True
    reference[20:22, 10:12, 14] = True
    return prediction, reference


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
