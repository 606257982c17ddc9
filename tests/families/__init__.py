"""One rule on many architectures. What each one holds is written down here from its module tree, not by the locator."""
