"""Computational features of a structure in an image (radiomics), to the definitions of the IBSI.

One file per family; each has a table `CODES` (name → identifier of the IBSI) and a function that gives the values by
name. What does not exist for a region is NaN, and `medseg.features.region.measure_region` says why.

Source:
    Zwanenburg et al., The Image Biomarker Standardization Initiative: standardized quantitative radiomics for
    high-throughput image-based phenotyping, Radiology 2020; the IBSI 1 reference manual (arXiv:1612.07003v11) has the
    definition behind each identifier.
"""
