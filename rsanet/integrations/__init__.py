"""RSANet in other programs: their formats, and what they call."""
