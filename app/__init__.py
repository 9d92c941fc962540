"""The HTTP service, the command line and the client around `encoder`. Knows bytes and status codes; no model math."""
