"""How each kind of image is shown to the network, and how far a view of it may be from the image; with reasons.

A preset is a value: the fields down to `side` decide pixels, and so the preprocessing id; those below are bounds of
augmentation, which happens later. The numbers of all sites of a run are the same; none is fitted to a site's data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

VERSION = 2
"""Raise it whenever `client.decoding`, `client.dicom` or `client.preprocessing` gives any image another pixel."""

_DECIDING = ("frame", "hu_windows", "percentiles", "foreground", "colour", "crop", "side")

ColourPolicy = Literal["keep", "grey", "colour"]
Frame = Literal["first", "middle"]
Crop = Literal["none", "foreground", "region"]


@dataclass(frozen=True)
class Preset:
    """How one kind of image is shown to the network."""

    image_size: int = 224  # pixels a side, unless the run says otherwise
    frame: Frame = "middle"  # of a multi-frame object
    hu_windows: tuple[
        tuple[float, float], ...
    ] = ()  # centre and width, HU; in place of the file's; 1, or 3 as channels
    percentiles: tuple[float, float] = (0.5, 99.5)  # shown black and white; deeper than 8 bits and no window
    foreground: bool = False  # percentiles of what is brighter than the background alone
    colour: ColourPolicy = "keep"  # keep: as most images of the data set are
    crop: Crop = "none"  # foreground: the box around what is not background; region: the device's ultrasound region
    side: bool = False  # mirrored, where needed, so that the brighter half is on the left
    flip: bool = False  # whether the mirror image is a possible patient
    rotate_degrees: float = 10.0  # at most, either way
    translate: float = 0.05  # at most, as a share of the side
    scale: float = 0.1  # at most, either way from 1
    brightness: float = 0.2  # at most, either way from 1; contrast likewise
    views: int = 4  # cached augmented views of a training image; 1 = none


GENERIC = Preset(flip=True)
"""Any picture of which nothing is known: the file's own window, else the 0.5 and 99.5 percentiles; small movements.

Percentiles in place of minimum and maximum, because a single bright marker or dead pixel would else decide the
contrast.
"""

CHEST_XRAY = Preset(rotate_degrees=7.0)
"""Radiographs of the chest (CR, DX).

Intensity: the VOI LUT or window that the device wrote (PS3.3, C.11.2), because it is what the radiologist saw; else
percentiles. MONOCHROME1 is inverted. Geometry: letterboxed, for the heart's width against the thorax is a finding.
Augmentation: small rotation and shift, as patients stand; no mirror image, which would be situs inversus and turn the
side marker. Source: Rajpurkar et al., CheXNet, arXiv 1711.05225, and Cohen et al., TorchXRayVision, MIDL 2022, for size
and the absence of vertical flips; the ban on the mirror is ours, from the anatomy.
"""

CT = Preset(hu_windows=((40.0, 400.0),), rotate_degrees=5.0, brightness=0.0)
"""CT in one soft-tissue window, centre 40 and width 400 HU; brightness is density and stays as it is."""

CHEST_CT = Preset(
    hu_windows=((40.0, 400.0), (-600.0, 1500.0), (40.0, 80.0)),
    colour="colour",
    rotate_degrees=5.0,
    brightness=0.0,
)
"""CT of the chest, in three windows as the three channels of the network.

Intensity: Hounsfield units are absolute, so the windows are the same everywhere, whatever the file proposes: soft
tissue 40/400, lung -600/1500, and a narrow 40/80 for blood and effusion; a single 8-bit window would lose either lung
or mediastinum. Files without Hounsfield units (screenshots) are shown by their own window in all three channels.
Geometry: letterboxed; the middle frame of an enhanced object. Augmentation: small rotation, no brightness (it is
density), no mirror (heart, liver). Source: the windows are those of everyday reading; several windows as channels:
Lee et al., Nat. Biomed. Eng. 3 (2019) 173-182.
"""

MAMMOGRAPHY = Preset(
    image_size=512, crop="foreground", side=True, flip=False, rotate_degrees=10.0, scale=0.1, brightness=0.1
)
"""Mammograms (MG), one view each.

Intensity: the device's VOI LUT; "for processing" images have none and are shown by percentiles: do not mix the two.
Geometry: cropped to the breast, the chest wall on the left by mirroring right breasts, letterboxed at 512, because
microcalcifications and small masses vanish at 224 and a hard resize would change the breast's shape. Augmentation:
rotation to 10 degrees; no further mirror, since the side is normalised. Source: Shen et al., Sci. Rep. 9 (2019) 12495
(resolution); Wu et al., IEEE TMI 39 (2020) 1184-1194 (crop and orientation).
"""

BRAIN_MRI = Preset(percentiles=(1.0, 99.0), foreground=True, flip=True, rotate_degrees=10.0)
"""Slices of MRI of the head (MR).

Intensity: MR has no absolute unit, so the 1 and 99 percentiles of the head decide, the air around it left out: else
the share of air in the slice would decide the contrast, and a slice of almost only air would be noise. Geometry:
letterboxed; the middle frame of an enhanced object. Augmentation: mirror image (leave it out with labels that name a
side), rotation to 10 degrees. Source: Nyul and Udupa, Magn. Reson. Med. 42 (1999) 1072-1081 (percentile landmarks
within the head); Isensee et al., nnU-Net, Nat. Methods 18 (2021) 203-211 (statistics inside the head alone).
"""

DERMOSCOPY = Preset(colour="colour", frame="first", flip=True, rotate_degrees=180.0, brightness=0.1)
"""Dermoscopic and clinical photographs (XC).

Intensity: colour as the camera gave it, since colour is a criterion of melanoma. Geometry: letterboxed. Augmentation:
any rotation and the mirror image, for skin has no up and down; brightness to 10 per cent, for lamps differ. Source:
Codella et al., ISIC 2018, arXiv 1902.03368; Perez et al., ISIC workshop at MICCAI 2018 (which augmentation pays).
"""

ULTRASOUND = Preset(colour="grey", crop="region", rotate_degrees=5.0)
"""Ultrasound stills and clips (US).

Intensity: grey by luma; the colour of overlays and of Doppler is dropped. Geometry: cropped to the regions with
tissue that the device declares (SequenceOfUltrasoundRegions, PS3.3, C.8.5.5), because what lies around them is text
that names patient and device; the middle frame of a clip, for the first is often frozen in preparation; letterboxed.
All frames of a clip belong to one patient, so a clip is one example. Augmentation: 5 degrees, gain as brightness to
20 per cent; no mirror, for the marker gives the side of the probe. Source: Al-Dhabyani et al., Data in Brief 28
(2020) 104863 (cropping); Ouyang et al., EchoNet-Dynamic, Nature 580 (2020) 252-256 (masking of what is outside of the
sector).
"""

FUNDUS = Preset(colour="colour", frame="first", crop="foreground", flip=True, rotate_degrees=15.0, brightness=0.1)
"""Photographs of the eye's background (OP): colour, cropped to the disc of the image, mirrored freely (left, right
eye).

Source: Gulshan et al., JAMA 316 (2016) 2402-2410.
"""

PHANTOM = Preset(image_size=128, rotate_degrees=7.0)
"""The drawn hospitals of `simulations.phantoms`: as chest X-rays, small."""

PRESETS: Mapping[str, Preset] = {
    "generic": GENERIC,
    "chest-xray": CHEST_XRAY,
    "ct": CT,
    "chest-ct": CHEST_CT,
    "mammography": MAMMOGRAPHY,
    "brain-mri": BRAIN_MRI,
    "dermoscopy": DERMOSCOPY,
    "ultrasound": ULTRASOUND,
    "fundus": FUNDUS,
    "phantom": PHANTOM,
}
"""The presets by name; a new modality is one constant and one line."""


def preprocessing_id(preset: Preset, size: int) -> str:
    """Return 16 hex digits that stand for every pixel-deciding choice: preset fields, size and code version.

    Examples:
        >>> from common.presets import PRESETS
        >>> preprocessing_id(PRESETS["generic"], 224) == preprocessing_id(PRESETS["generic"], 128)
        False
        >>> preprocessing_id(PRESETS["generic"], 224) == preprocessing_id(PRESETS["chest-xray"], 224)
        True
    """
    choices: dict[str, Any] = {name: getattr(preset, name) for name in _DECIDING}
    canonical = json.dumps({**choices, "size": size, "version": VERSION}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
