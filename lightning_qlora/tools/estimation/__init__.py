"""What a run would take, from its configuration alone."""
