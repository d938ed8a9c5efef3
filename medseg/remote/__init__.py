"""Prediction of scans that lie elsewhere (DICOM archives, object storage) and by processes elsewhere (Ray)."""
