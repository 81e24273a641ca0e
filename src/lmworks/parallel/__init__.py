"""One run on many ranks: layouts, counted collectives, placements, pipelines, and how ranks are started."""
