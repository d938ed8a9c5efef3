"""An evaluation or a run as one HTML page for people: complete in itself, offline, safe to open and to print."""
