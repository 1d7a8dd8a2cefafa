"""RSA in the frameworks that others train with. Each needs its own extra, and is imported when it is used."""
