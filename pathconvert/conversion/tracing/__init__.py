"""From a network to what its forward says: which channels share a factor, and who reads them."""
