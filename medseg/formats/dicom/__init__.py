"""DICOM in and out: series of images, and the structures that are drawn on them (SEG, RTSTRUCT).

`files` finds files and parses headers, `series` makes one volume of a series, `structures` is what annotations of
either kind have in common. Nothing here parses a tag that names the patient, but where a written SEG or RTSTRUCT must
carry it over from its source.
"""
