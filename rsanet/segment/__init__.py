"""Lesion segmentation from files to scores. Needs the extra ``segment``."""
