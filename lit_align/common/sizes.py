"""Bytes for people."""


def format_bytes(count: float) -> str:
    """Format a number of bytes in decimal units, as `1.25 GB`, `20.9 MB` or `310.0 kB`."""
    if count >= 1e12:
        return f"{count / 1e12:,.2f} TB"
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    if count >= 1e6:
        return f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count:.0f} B"
