"""One step of a run on its longest batch, and what must hold before the run is worth starting."""
