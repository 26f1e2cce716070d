"""What every room needs: paths, seeds, provenance of results, patches."""
