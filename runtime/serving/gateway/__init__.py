"""The OpenAI-compatible HTTP gateway in front of a server. Importing this costs nothing."""
