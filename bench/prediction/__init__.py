"""`outrider evaluate`: how well predictors foretell the routing of text they have never seen."""
