"""Simulated patients with multiple-sclerosis lesions, on the real anatomy that nilearn ships.

The anatomy is the ICBM 2009a nonlinear symmetric template (Fonov et al., NeuroImage 2009): a T1-weighted
average and its grey- and white-matter maps. It is loaded at run time and never written to disk as it is. Each
patient gets an asymmetric warp of it, enlarged ventricles, lesions where multiple sclerosis puts them, and
images with texture, bias field and Rician noise. A patient follows from the seed alone: lesions are drawn in
template space, in millimetres, so that the same seed is the same patient at every voxel size.

Scores on these images say nothing about clinical accuracy.
"""

from rsanet.segment.scenario import Scenario
from rsanet.segment.simulation.anatomy import Anatomy, load_anatomy
from rsanet.segment.simulation.cohort import Subject, simulate
from rsanet.segment.simulation.patient import Patient, Session, simulate_patient
from rsanet.segment.simulation.streams import subject_seed

__all__ = [
    "Anatomy",
    "Patient",
    "Scenario",
    "Session",
    "Subject",
    "load_anatomy",
    "simulate",
    "simulate_patient",
    "subject_seed",
]
