"""The verbs of the `rsanet` command, a file each. They parse and print; `rsanet.segment` does the work."""
