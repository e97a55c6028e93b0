"""Expert arithmetic by slot id. Import the modules; this door loads nothing, not even torch."""
