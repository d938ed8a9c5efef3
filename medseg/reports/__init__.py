"""What people look at: evaluations, tables, overlays of masks on scans, curves."""
