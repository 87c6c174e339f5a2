"""Published data sets in the files they come in, turned into manifests."""
