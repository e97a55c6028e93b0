"""Serving: many clients, one engine. Importing this costs nothing."""
