"""Every mistake of item "Bad input": told once, with place, cause and remedy, exit code 2, nothing half-written."""
