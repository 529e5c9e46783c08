"""Reports: one HTML file each, with everything in it, that opens anywhere and asks the network for nothing."""
