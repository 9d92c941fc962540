"""HTTP/1 on the service's connections: syntax, limits of time and bytes, and how a connection ends."""
