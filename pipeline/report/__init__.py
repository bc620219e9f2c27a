"""The report of a run: page.py lays out what the other files collect from the run record and the manifests."""
