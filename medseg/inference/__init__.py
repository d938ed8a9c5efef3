"""From a scan to labels on the scan's own grid: tiles, logits, export."""
