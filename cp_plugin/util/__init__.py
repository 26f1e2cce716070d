"""What every room needs: paths, seeds, provenance, patches, undoing, private interfaces."""
