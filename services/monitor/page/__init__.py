"""The monitor's own web page: read-only, rendered here, nothing from elsewhere."""
